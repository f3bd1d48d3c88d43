"""Plots of results: score, KL and tokens per second over density, one curve for each policy."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from griffin_evals.cells import DENSE_SETTING, DIVERGENCE, SPEED, Cell, Setting
from griffin_evals.paired import ERRORS_NEEDED, Estimate
from griffin_evals.results import Group

mpl.use("Agg")  # writes files and needs no display

PANEL_INCHES, HEIGHT_INCHES, DPI = 3.6, 3.7, 120
"""Three panels are 1300 pixels wide, which is readable at the width of a README, about 800."""

COLOURS = {
    "topk": "#0b6e4f",
    "topk_sampled": "#2a78c2",
    "sampled": "#7a4fb5",
    "magnitude": "#d07c00",
    "random": "#b3261e",
}
MARKS = {"topk": "o", "topk_sampled": "s", "sampled": "^", "magnitude": "D", "random": "v"}

DODGE = 0.009
"""Shift in density between two policies, so that their error bars do not overlap."""

LOGARITHMIC = 30
"""The ratio of the largest to the smallest value above which an axis is logarithmic."""

FONT: Any = {"font.size": 11, "axes.titlesize": 11, "axes.labelsize": 11, "legend.fontsize": 11}

BANDS = f"bands: ± {ERRORS_NEEDED:g} standard errors; of scores, those of the difference to dense"

Points = Mapping[Setting, Estimate]


def draw(group: Group, out: Path, number: int) -> list[Path]:
    """Draws one figure for each mode of a group, and one with its tasks side by side. The panels
    depend on what was measured.

    Args:
        number: the number of the group in ``out``, for file names.
    """
    files = []
    name = re.sub(r"[^A-Za-z0-9.]+", "-", Path(group.identity.model).name)
    for mode in group.modes:
        panels = _panels(group, mode)
        if panels:
            files.append(_figure(group, panels, out / f"{name}-{number}-{mode}.png"))
        tasks = _task_panels(group, mode)
        if len(tasks) > 1:
            files.append(_figure(group, tasks, out / f"{name}-{number}-{mode}-tasks.png"))
    return files


Panel = tuple[str, str, Points, Estimate | None]
"""Title, label of the y axis, points, and the value of dense."""


def _panels(group: Group, mode: str) -> list[Panel]:
    panels: list[Panel] = []
    means = group.means(mode)
    if len(means) > 1:
        points = {m.setting: _with_error(m.score, m.difference) for m in means}
        count = len(group.mean_tasks(mode))
        title = f"Score, mean over {count} task{'s' * (count > 1)}"
        panels.append((title, "score", points, _exact(points.pop(DENSE_SETTING, None))))
    for what, title, label in (
        (DIVERGENCE, "KL from dense", "KL, nats a token"),
        (SPEED, "Speed, one request at a time", "tokens/s"),
    ):
        if cells := group.beside(what):
            points = {setting: _value(cell) for setting, cell in cells.items()}
            dense = points.pop(DENSE_SETTING, None)
            if what == DIVERGENCE:
                dense = Estimate(mean=0.0, stderr=None)
            panels.append((title, label, points, dense))
    return panels


def _with_error(score: Estimate, difference: Estimate | None) -> Estimate:
    """Returns a score with the error of its difference to dense, which the curves show."""
    return Estimate(mean=score.mean, stderr=None if difference is None else difference.stderr)


def _exact(dense: Estimate | None) -> Estimate | None:
    """Returns dense without an error, for plots of differences to dense."""
    return dense and Estimate(mean=dense.mean, stderr=None)


def _value(cell: Cell) -> Estimate:
    measured = next(iter(cell.measures.values()))
    return Estimate(mean=measured.value, stderr=measured.stderr)


def _task_panels(group: Group, mode: str) -> list[Panel]:
    panels: list[Panel] = []
    for task, cells in group.tasks.items():
        name, measured = next(iter(next(iter(cells.values())).measures.items()))
        points: dict[Setting, Estimate] = {}
        for setting, cell in cells.items():
            if setting.dense or setting.mode == mode:
                value, difference = _value(cell), group.difference(cell, name)
                if measured.perplexity and difference and difference.stderr is not None:
                    stderr = value.mean * difference.stderr  # nats' error, to first order
                    difference = Estimate(mean=value.mean, stderr=stderr)
                points[setting] = _with_error(value, difference)
        dense = _exact(points.pop(DENSE_SETTING, None))
        if points:
            panels.append((task, name.replace("_", " "), points, dense))
    return panels


def _figure(group: Group, panels: list[Panel], path: Path) -> Path:
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    size = (max(2, across) * PANEL_INCHES, down * HEIGHT_INCHES + 0.7)
    with plt.rc_context(FONT):
        figure, grid = plt.subplots(down, across, figsize=size, squeeze=False)
        axes = list(grid.flat)
        for each, panel in zip(axes, panels, strict=False):
            draw_panel(each, panel)
        for spare in axes[len(panels) :]:
            spare.remove()
        handles: dict[str, Artist] = {}
        for each in axes[: len(panels)]:
            handles |= {str(h.get_label()): h for h in each.get_legend_handles_labels()[0]}
        figure.suptitle(f"{group.title}\n{BANDS}", fontsize=10)
        figure.legend(handles.values(), list(handles), loc="lower center", ncols=6, frameon=False)
        figure.tight_layout(rect=(0, 0.35 / size[1], 1, 1))
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
    return path


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draws a curve for each policy, with bands and bars of ``ERRORS_NEEDED`` standard errors."""
    title, label, points, dense = panel
    curves: defaultdict[str, list[tuple[float, Estimate]]] = defaultdict(list)
    for setting, estimate in points.items():
        curves[setting.policy].append((setting.density, estimate))
    if _spread(points) > LOGARITHMIC:
        axes.set_yscale("log")
        if dense is not None and dense.mean <= 0:
            dense = None  # a logarithmic axis has no zero
    for policy, curve in curves.items():
        if dense is not None:
            curve.append((1.0, dense))
        curve.sort(key=lambda point: point[0])
        aside = DODGE * (list(COLOURS).index(policy) - 2) if policy in COLOURS else 0.0
        xs = [density + aside * (density < 1) for density, _ in curve]
        ys = [estimate.mean for _, estimate in curve]
        errors = [ERRORS_NEEDED * (estimate.stderr or 0.0) for _, estimate in curve]
        colour = COLOURS.get(policy, "black")
        axes.plot(xs, ys, color=colour, marker=MARKS.get(policy, "o"), markersize=4.5, label=policy)
        low = [y - error for y, error in zip(ys, errors, strict=True)]
        high = [y + error for y, error in zip(ys, errors, strict=True)]
        axes.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.errorbar(xs, ys, yerr=errors, color=colour, capsize=2.5, linestyle="none", alpha=0.7)
    if dense is not None:
        axes.axhline(dense.mean, color="black", linestyle="--", linewidth=1.2, label="dense")
    axes.set_xlim(0, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_title(title)
    axes.set_xlabel("density (share of FF neurons)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _spread(points: Points) -> float:
    """Returns the ratio of the largest to the smallest value; 0 if an axis cannot be
    logarithmic."""
    values = [estimate.mean for estimate in points.values()]
    return max(values) / min(values) if values and min(values) > 0 else 0.0
