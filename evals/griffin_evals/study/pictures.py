"""The plots of docs/STUDY.md, from its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from griffin_evals.study.causes import KINDS
from griffin_evals.study.store import Figures
from griffin_evals.study.temperature import TEXT
from griffin_evals.study.tradeoff import DENSITIES

mpl.use("Agg")  # files, wherever there is no display

WIDTH, HEIGHT, DPI = 10.0, 4.4, 120
"""1200 pixels wide: readable at the 800 of a README."""

STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.constrained_layout.use": True,
}

BAND = "bands and bars: ± 2 standard errors"


def draw(figures: Figures, folder: Path) -> list[Path]:
    """Draws all plots into a folder, and overwrites earlier ones.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.rc_context(STYLE):
        for name, picture in PICTURES.items():
            figure = picture(figures["models"])
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=DPI, metadata={"Software": None})
            plt.close(figure)
    return paths


def _panels(titles: Sequence[str], height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, len(titles), figsize=(WIDTH, height), squeeze=False)
    for each, title in zip(axes[0], titles, strict=True):
        each.set_title(title)
    figure.supxlabel(BAND, fontsize=9, color="grey")
    return figure, list(axes[0])


def _line(
    axes: Axes, x: Sequence[float], values: Figures, label: str, colour: str, style: str = "-"
) -> None:
    """A curve with its error band."""
    mean = np.array(values["mean"], dtype=float)
    error = 2 * np.array([0.0 if se is None else se for se in values["se"]])
    axes.plot(x, mean, style, color=colour, marker="o", markersize=3, label=label)
    axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.18, linewidth=0)


def _flocking(models: Sequence[Figures]) -> Figure:
    figure, axes = _panels(["Tokens agree on their neurons", "Half of the neurons hold the norm"])
    for number, model in enumerate(models):
        layers = np.arange(model["layers"]) / max(1, model["layers"] - 1)
        by_layer = model["parts"]["flocking"]["by_layer"]
        for each, name in zip(axes, ("agreement", "norm_mass"), strict=True):
            _line(each, layers, by_layer["texts"][name], model["label"], f"C{number}")
            _line(each, layers, by_layer["null"][name], "permuted", f"C{number}", ":")
    axes[0].set_ylabel("share of a token's strongest half\nthat the prompt's experts hold")
    axes[1].set_ylabel("norm mass of the experts at density 0.5")
    for each in axes:
        each.set_xlabel("depth of the layer (0 first, 1 last)")
    axes[0].legend()
    return figure


def _causes(models: Sequence[Figures]) -> Figure:
    figure, axes = _panels(["How much tokens agree", "Experts kept of the natural prompt's"])
    apart = 0.4 / len(models)
    for number, model in enumerate(models):
        kinds = model["parts"]["causes"]["kinds"]
        for each, name in zip(axes, ("agreement", "overlap"), strict=True):
            x = np.arange(len(KINDS)) + (number - (len(models) - 1) / 2) * apart
            _marks(each, x, [kinds[kind][name] for kind in KINDS], model["label"], number)
    axes[0].set_ylabel("agreement")
    axes[1].set_ylabel("share of the natural prompt's experts")
    for each in axes:
        each.axhline(0.5, color="grey", linestyle=":", label="random sets")
        each.set_xticks(np.arange(len(KINDS)), KINDS, rotation=25)
        each.set_xlabel("prompt")
        each.set_ylim(0.4, 1.02)
    axes[0].legend(loc="upper left")
    return figure


def _marks(axes: Axes, x: Any, values: Sequence[Figures], label: str, number: int) -> None:
    """A marker with its error bar for each kind."""
    error = [2 * (value["se"] or 0.0) for value in values]
    mean = [value["mean"] for value in values]
    axes.errorbar(x, mean, yerr=error, fmt="o", color=f"C{number}", label=label, capsize=3)


def _prefix(models: Sequence[Figures]) -> Figure:
    figure, axes = _panels(["Experts of what follows that were found", "Divergence from dense"])
    for number, model in enumerate(models):
        for kind, style in (("short", "-"), ("long", "--")):
            of_kind = model["parts"]["prefix"].get(kind)
            if of_kind is not None:
                label = f"{model['label']}, prompt of {of_kind['tokens'][-1]}"
                for each, name in zip(axes, ("overlap", "kl"), strict=True):
                    _line(each, of_kind["tokens"], of_kind[name], label, f"C{number}", style)
    axes[0].axhline(0.5, color="grey", linestyle=":", label="random sets")
    axes[0].set_ylabel("share of the experts of what follows")
    axes[1].set_ylabel("KL to dense of the continuation, nats")
    axes[1].set_ylim(bottom=0)
    for each in axes:
        each.set_xscale("log", base=2)
        each.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        each.set_xlabel("first tokens that choose the experts")
    axes[1].legend()
    return figure


def _drift(models: Sequence[Figures]) -> Figure:
    figure, axes = _panels(["The prompt's experts in later windows", "Divergence on them"])
    for number, model in enumerate(models):
        drift = model["parts"]["drift"]
        for kind, style, shown in (("long", "-", "long text"), ("generated", "--", "generated")):
            if kind in drift:
                label = f"{model['label']}, {shown}"
                of_kind = drift[kind]
                colour = f"C{number}"
                _line(axes[0], of_kind["distance"], of_kind["overlap"], label, colour, style)
        if "long" in drift:
            long = drift["long"]
            _line(axes[1], long["kl_distance"], long["kl"], model["label"], f"C{number}")
    axes[0].axhline(0.5, color="grey", linestyle=":", label="random sets")
    axes[0].set_ylabel("share of the window's experts\nthat are the prompt's")
    axes[1].set_ylabel("KL to dense, nats")
    axes[1].set_ylim(bottom=0)
    for each in axes:
        each.set_xlabel("tokens between prompt and window")
        if each.lines:  # there may be no long texts
            each.legend()
    return figure


def _domains(models: Sequence[Figures]) -> Figure:
    names = models[0]["parts"]["domains"]["domains"]
    figure, axes = plt.subplots(1, len(models), figsize=(WIDTH, 4.6), squeeze=False, sharey=True)
    random = min(model["parts"]["domains"]["random"] for model in models)
    shades = mpl.cm.ScalarMappable(mpl.colors.Normalize(random, 0.8), "viridis")
    for each, model in zip(axes[0], models, strict=True):
        domains = model["parts"]["domains"]
        cells = [[_mean(cell) for cell in row] for row in domains["matrix"]]
        each.imshow(cells, cmap="viridis", norm=shades.norm)
        for row, column in np.ndindex(len(names), len(names)):
            if not np.isnan(value := cells[row][column]):
                colour = "black" if value > 0.62 else "white"
                each.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        each.set_xticks(range(len(names)), names, rotation=30, ha="right")
        each.set_yticks(range(len(names)), names)
        each.grid(visible=False)
        each.set_title(model["label"])
        each.set_xlabel("domain of one text")
    axes[0][0].set_ylabel("domain of the other text")
    figure.colorbar(
        shades, ax=axes[0].tolist(), label="mean Jaccard similarity (lowest: random sets)"
    )
    return figure


def _mean(cell: Figures | None) -> float:
    return float("nan") if cell is None else float(cell["mean"])


def _domain_layers(models: Sequence[Figures]) -> Figure:
    figure, axes = _panels([model["label"] for model in models])
    for each, model in zip(axes, models, strict=True):
        domains = model["parts"]["domains"]
        for number, kind in enumerate(("within", "across")):
            values = domains["by_layer"][kind]
            if values["mean"][0] is not None:
                label = f"{kind} domains"
                _line(each, range(model["layers"]), values, label, f"C{number + 2}")
        each.axhline(domains["random"], color="grey", linestyle=":", label="random sets")
        each.set_xlabel("layer")
        each.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        each.set_ylim(0.2, 1)
        each.legend()
    axes[0].set_ylabel("Jaccard similarity of two texts' experts")
    return figure


def _temperature(models: Sequence[Figures]) -> Figure:
    figure, axes = _panels(["Experts that are the prompt's", "Divergence on the prompt's experts"])
    kinds = list(models[0]["parts"]["temperature"]["kinds"])
    temperatures = [kind for kind in kinds if kind != TEXT]
    names = [*(f"T = {float(kind):g}" for kind in temperatures), "own text"]
    apart = 0.4 / len(models)
    for number, model in enumerate(models):
        of_kind = model["parts"]["temperature"]["kinds"]
        x = np.arange(len(names)) + (number - (len(models) - 1) / 2) * apart
        for each, name in zip(axes, ("overlap", "kl"), strict=True):
            values = [of_kind[kind][name] for kind in (*temperatures, TEXT)]
            _marks(each, x, values, model["label"], number)
    axes[0].axhline(0.5, color="grey", linestyle=":", label="random sets")
    axes[0].set_ylim(0.4, 1)
    axes[0].set_ylabel("share of the completion's experts")
    axes[1].set_ylabel("KL to dense, nats")
    for each in axes:
        each.set_xticks(np.arange(len(names)), names)
        each.set_xlabel("completion")
    axes[0].legend()
    return figure


def _tradeoff(models: Sequence[Figures]) -> Figure:
    titles = [*(model["label"] for model in models), "Decode step, one stream"]
    figure, axes = _panels(titles, height=4.8)
    for number, (each, model) in enumerate(zip(axes, models, strict=False)):
        tradeoff = model["parts"]["tradeoff"]
        for place, policy in enumerate(dict.fromkeys(r["policy"] for r in tradeoff["quality"])):
            rows = [row for row in tradeoff["quality"] if row["policy"] == policy]
            x = [row["density"] for row in rows]
            colour = f"C{place + 2}"
            _line(each, x, _column(rows, "kl"), policy, colour)
        each.set_yscale("log")
        each.set_ylabel("KL to dense, nats" if number == 0 else "")
        speed = tradeoff["speed"]["by_density"]
        x = [row["density"] for row in speed]
        _line(axes[-1], x, _column(speed, "speedup"), model["label"], f"C{number}")
    axes[-1].set_ylabel("tokens/s over those of dense")
    for each in axes:
        each.set_xlabel("density")
        each.set_xlim(1.03, min(DENSITIES) - 0.03)
        each.legend()
    return figure


def _column(rows: Sequence[Figures], name: str) -> Figures:
    return {key: [row[name][key] for row in rows] for key in ("mean", "se")}


PICTURES: dict[str, Callable[[Sequence[Figures]], Figure]] = {
    "flocking": _flocking,
    "causes": _causes,
    "prefix": _prefix,
    "drift": _drift,
    "domains": _domains,
    "domains-by-layer": _domain_layers,
    "temperature": _temperature,
    "tradeoff": _tradeoff,
}
