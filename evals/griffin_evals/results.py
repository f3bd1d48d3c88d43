"""Computes results from cells: differences to dense, means over tasks, and comparisons of
policies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from griffin_evals.cells import DENSE_SETTING, DIVERGENCE, SPEED, Cell, Measured, Setting
from griffin_evals.paired import Estimate, mean_of, mean_over_tasks, paired
from griffin_evals.tasks.metrics import BITS

COMPARED = (
    ("topk", ("topk_sampled", "sampled", "magnitude", "random")),
    ("topk_sampled", ("magnitude", "random")),
    ("sampled", ("magnitude", "random")),
)
"""Pairs of policies; the paper expects the first of each pair to be better."""

TASKS, KL = "mean over tasks", "KL"
RIGHT = "bits a byte of the right choice, mean over tasks"


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of tasks' scores with one setting, each task with the same weight.

    Args:
        score: the mean; its error says how much it would vary with other documents of these tasks.
        difference: to dense, paired by document; None for dense itself.
    """

    setting: Setting
    score: Estimate
    difference: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two policies at one density, paired by document.

    Args:
        by: ``TASKS``, ``RIGHT`` or ``KL``.
        advantage: the advantage of the first policy over the second; positive if the first is
            better.
    """

    mode: str
    density: float
    policies: tuple[str, str]
    by: str
    advantage: Estimate

    def __str__(self) -> str:
        one, other = self.policies
        sign = "-" if self.advantage.mean < 0 else "+"
        error = "" if self.advantage.stderr is None else f" ± {self.advantage.stderr:.3f}"
        figures = f"{sign}{abs(self.advantage.mean):.3f}{error}"
        if not self.advantage.claimed:
            return f"{one} and {other}: no difference shown ({figures})"
        return f"{one} {'worse' if sign == '-' else 'better'} than {other}: {figures}"


class Group:
    """The cells of one model, one limit and one seed, which can be compared."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = sorted(cells, key=lambda cell: _order(cell.identity.setting))
        self.identity = cells[0].identity

    @property
    def title(self) -> str:
        identity = self.identity
        limit = "all documents" if identity.limit is None else f"at most {identity.limit} documents"
        return f"{identity.model}, {identity.way}, {identity.dtype}, {limit}, seed {identity.seed}"

    @cached_property
    def tasks(self) -> dict[str, dict[Setting, Cell]]:
        """Returns the cells of each task, by name."""
        tasks: defaultdict[str, dict[Setting, Cell]] = defaultdict(dict)
        for cell in self.cells:
            if cell.identity.task not in (DIVERGENCE, SPEED):
                tasks[cell.identity.task][cell.identity.setting] = cell
        return dict(sorted(tasks.items()))

    def beside(self, what: str) -> dict[Setting, Cell]:
        """The cells of ``DIVERGENCE`` or ``SPEED``."""
        return {c.identity.setting: c for c in self.cells if c.identity.task == what}

    @property
    def modes(self) -> list[str]:
        """Returns the modes in which any setting but dense was run."""
        settings = {cell.identity.setting for cell in self.cells}
        return sorted({setting.mode for setting in settings if not setting.dense}, reverse=True)

    def difference(self, cell: Cell, name: str) -> Estimate | None:
        """Returns a measure's mean difference to dense; None for dense itself, or if dense is not
        finished."""
        dense = self.tasks[cell.identity.task].get(DENSE_SETTING)
        if dense is None or cell is dense or name not in dense.measures:
            return None
        return paired(cell.measures[name].items, dense.measures[name].items)

    @cached_property
    def scored(self) -> list[dict[Setting, Cell]]:
        """Returns the tasks that means over tasks include: those whose score is a share of
        documents and not a perplexity."""
        return [
            cells
            for cells in self.tasks.values()
            if not _score(next(iter(cells.values()))).perplexity
        ]

    def means(self, mode: str) -> list[Mean]:
        """Returns the means over the tasks that were run in a mode, dense first, for settings in
        which all of these tasks are finished."""
        taken = [c for c in self.scored if any(s.mode == mode and not s.dense for s in c)]
        settings = {s for cells in taken for s in cells if s.mode == mode or s.dense}
        whole = [s for s in settings if all(s in cells for cells in taken)]
        means = []
        for setting in sorted(whole, key=_order):
            done = [cells[setting] for cells in taken]
            score = mean_over_tasks([mean_of(_score(cell).items) for cell in done])
            difference = None
            if not setting.dense and all(DENSE_SETTING in cells for cells in taken):
                pairs = [(cells[setting], cells[DENSE_SETTING]) for cells in taken]
                difference = mean_over_tasks([_better(one, dense) for one, dense in pairs])
            means.append(Mean(setting=setting, score=score, difference=difference))
        return means

    def mean_tasks(self, mode: str) -> list[str]:
        """The tasks of ``means``."""
        return [
            next(iter(cells.values())).identity.task
            for cells in self.scored
            if any(s.mode == mode and not s.dense for s in cells)
        ]

    def comparisons(self) -> list[Comparison]:
        """Compares policies at each density."""
        found = []
        for mode in self.modes:
            taken = [c for c in self.scored if any(s.mode == mode and not s.dense for s in c)]
            choices = [c for c in taken if BITS in next(iter(c.values())).measures]
            found += _compared(mode, TASKS, taken)
            found += _compared(mode, RIGHT, choices, BITS)
            if beside := self.beside(DIVERGENCE):
                found += _compared(mode, KL, [beside])
        return found


def _compared(
    mode: str, by: str, sets: Sequence[Mapping[Setting, Cell]], measure: str | None = None
) -> list[Comparison]:
    """Compares policies by a measure, or by the tasks' scores."""
    if not sets:
        return []
    comparisons = []
    densities = sorted({s.density for cells in sets for s in cells if not s.dense}, reverse=True)
    for density in densities:
        for one, others in COMPARED:
            for other in others:
                first, second = (
                    Setting(mode=mode, density=density, policy=policy)  # type: ignore[arg-type]
                    for policy in (one, other)
                )
                if all(first in cells and second in cells for cells in sets):
                    pairs = [(cells[first], cells[second]) for cells in sets]
                    estimates = [_better(*pair, measure) for pair in pairs]
                    comparisons.append(
                        Comparison(
                            mode=mode,
                            density=density,
                            policies=(one, other),
                            by=by,
                            advantage=mean_over_tasks(estimates),
                        )
                    )
    return comparisons


def _better(one: Cell, other: Cell, measure: str | None = None) -> Estimate:
    """Returns by how much the first cell is better in a measure, or in its score."""
    first, second = (
        _score(cell) if measure is None else cell.measures[measure] for cell in (one, other)
    )
    items = (first.items, second.items) if first.higher_is_better else (second.items, first.items)
    return paired(*items)


def _score(cell: Cell) -> Measured:
    return next(iter(cell.measures.values()))


def _order(setting: Setting) -> tuple[bool, str, float, int]:
    """Dense first, then from the highest density down, policies as in the paper."""
    policies = ["topk", "topk_sampled", "sampled", "magnitude", "random"]
    known = policies.index(setting.policy) if setting.policy in policies else -1
    return not setting.dense, setting.mode, -setting.density, known


def groups_of(cells: Iterable[Cell]) -> list[Group]:
    """Groups cells that can be compared; models are ordered by name."""
    groups: defaultdict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.identity.run].append(cell)
    return [Group(groups[key]) for key in sorted(groups, key=str)]


def as_json(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns the contents of results.json."""
    return {"griffin_eval": 1, "groups": [_group_json(group) for group in groups]}


def _group_json(group: Group) -> dict[str, Any]:
    cells = []
    for cell in group.cells:
        measures = {}
        for name, measured in cell.measures.items():
            values = asdict(measured)
            del values["items"]
            if cell.identity.task not in (DIVERGENCE, SPEED):
                values["difference_to_dense"] = _estimate(group.difference(cell, name))
            measures[name] = values
        identity = asdict(cell.identity)
        cells.append({**identity, "n": cell.n, "measures": measures, "figures": cell.figures})
    return {
        "title": group.title,
        "cells": cells,
        "means": [
            {
                **asdict(mean.setting),
                "of_mode": mode,
                "tasks": group.mean_tasks(mode),
                "score": _estimate(mean.score),
                "difference_to_dense": _estimate(mean.difference),
            }
            for mode in group.modes
            for mean in group.means(mode)
        ],
        "comparisons": [
            {
                "mode": each.mode,
                "density": each.density,
                "policies": each.policies,
                "by": each.by,
                "advantage": _estimate(each.advantage),
                "in_words": str(each),
            }
            for each in group.comparisons()
        ],
    }


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {**asdict(estimate), "beyond_two_errors": estimate.claimed}
