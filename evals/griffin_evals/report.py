"""Writes results as tables, JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from griffin_evals.cells import DIVERGENCE, SPEED, Cell, Cells, Setting, write_whole
from griffin_evals.paired import Estimate
from griffin_evals.pictures import draw
from griffin_evals.results import KL, Group, as_json, groups_of
from griffin_evals.tasks.errors import EvaluationError

LEGEND = """\
± is one standard error. Differences to dense are paired by document. They have the unit of the
score, except for perplexities, where they are in nats (the logarithm of the ratio). **Bold** marks
differences of more than two standard errors; smaller ones claim nothing. Norm mass is the share of
the activation norm that the experts hold.
"""


def write_report(out: Path) -> list[Path]:
    """Writes results.json, results.md and the plots of all cells in a directory.

    Raises:
        EvaluationError: the directory has no cell, or a damaged one.
    """
    groups = groups_of(Cells(out / "cells").all())
    if not groups:
        raise EvaluationError(f"{out}: holds no cells; allowed: a directory of griffin eval --out")
    written = [out / "results.json", out / "results.md"]
    write_whole(written[0], json.dumps(as_json(groups), indent=1))
    pictures = [draw(group, out, number) for number, group in enumerate(groups)]
    write_whole(written[1], markdown(groups, pictures))
    return [*written, *(picture for each in pictures for picture in each)]


def markdown(groups: Sequence[Group], pictures: Sequence[Sequence[Path]]) -> str:
    """Returns all tables of all groups.

    Args:
        pictures: the plots of each group.
    """
    parts = ["# Results of griffin eval\n", LEGEND]
    for group, drawn in zip(groups, pictures, strict=True):
        parts.append(f"## {group.title}\n")
        parts += [f"![{path.stem}]({path.name})\n" for path in drawn]
        for mode in group.modes:
            parts += _means(group, mode)
        parts += _comparisons(group)
        for task, cells in group.tasks.items():
            parts += [f"### {task}\n", _task(group, list(cells.values()))]
        parts += _beside(group)
    return "\n".join(parts)


def _means(group: Group, mode: str) -> list[str]:
    tasks = group.mean_tasks(mode)
    if not tasks:
        return []
    rows = [
        [*_setting(mean.setting), _figure(mean.score), _claim(mean.difference)]
        for mean in group.means(mode)
    ]
    heads = ["density", "policy", "mean score", "difference to dense"]
    return [f"### Mean over {', '.join(tasks)} ({mode})\n", _table(heads, rows)]


def _comparisons(group: Group) -> list[str]:
    lines = []
    for each in group.comparisons():
        by = f"{each.by}, nats" if each.by == KL else f"{each.by} ({each.mode})"
        lines.append(f"- density {each.density:g}, {by}: {each}")
    return ["### Policies compared\n", "\n".join(lines) + "\n"] if lines else []


def _task(group: Group, cells: Sequence[Cell]) -> str:
    names = list(cells[0].measures)
    modes = {cell.identity.setting.mode for cell in cells}
    heads = ["density", "policy", *(["mode"] if len(modes) > 1 else []), "n"]
    for name in names:
        heads += [name, "difference"]
    rows = []
    for cell in cells:
        row = _setting(cell.identity.setting)
        if len(modes) > 1:
            row.append("" if cell.identity.setting.dense else cell.identity.setting.mode)
        row.append(str(cell.n))
        for name in names:
            measured = cell.measures[name]
            row.append(_figure(Estimate(mean=measured.value, stderr=measured.stderr)))
            row.append(_claim(group.difference(cell, name)))
        mass = cell.figures.get("mean_norm_mass")
        rows.append([*row, "" if mass is None else f"{mass:.3f}"])
    return _table([*heads, "norm mass"], rows)


def _beside(group: Group) -> list[str]:
    parts = []
    titles = {DIVERGENCE: "Beside dense, token by token", SPEED: "Tokens a second"}
    for what, title in titles.items():
        if cells := group.beside(what):
            first = next(iter(cells.values()))
            rows = []
            for setting, cell in cells.items():
                values = [Estimate(mean=m.value, stderr=m.stderr) for m in cell.measures.values()]
                rows.append([*_setting(setting), str(cell.n), *map(_figure, values)])
            heads = ["density", "policy", "n", *(name.replace("_", " ") for name in first.measures)]
            parts += [f"### {title}\n"]
            if "what" in first.figures:
                parts.append(f"Measured as {first.figures['what']}.\n")
            parts.append(_table(heads, rows))
    return parts


def _setting(setting: Setting) -> list[str]:
    return [f"{setting.density:g}", setting.policy]


def _figure(estimate: Estimate) -> str:
    form = ".3f" if abs(estimate.mean) < 1000 else ".3g"
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:{form}}"
    return f"{estimate.mean:{form}}{error}"


def _claim(difference: Estimate | None) -> str:
    if difference is None:
        return ""
    sign = "+" if difference.mean >= 0 else ""
    text = f"{sign}{_figure(difference)}"
    return f"**{text}**" if difference.claimed else text


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
