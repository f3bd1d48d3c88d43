"""Plots of prompts' activations and experts like the paper's (arXiv 2404.01365, sections 3 and 4),
with files of the data that they show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import NDArray

from griffin_client import Analysis

mpl.use("Agg")  # writes files, without a display

Floats = NDArray[np.float32]

SIZE, DPI = (10.0, 5.0), 120
"""Inches and dots per inch: 1200 pixels wide, which is readable at a README's 800 or so."""

MOST_TOKENS, MOST_NEURONS = 256, 384
"""The size of a heatmap of activations. With more, values would share pixels and streaks fade."""

BRIGHTEST = 0.99
"""The quantile of the values at which the colours end, since a few are far above all others."""


@dataclass(frozen=True, kw_only=True)
class PromptAnalysis:
    """A prompt's analysis.

    Args:
        name: the prompt's name in titles and legends.
    """

    name: str
    analysis: Analysis

    @cached_property
    def s(self) -> Floats:
        """The statistic [L, F]."""
        return np.array([layer.s for layer in self.analysis.layers], dtype=np.float32)

    @cached_property
    def experts(self) -> list[NDArray[np.int32]]:
        """The experts [K] of each layer; K may differ."""
        return [np.array(layer.experts, dtype=np.int32) for layer in self.analysis.layers]

    def activations(self, layer: int) -> Floats:
        """The activations [T, F] of a layer that was asked for."""
        flat = np.array(self.analysis.activations[layer], dtype=np.float32)
        return flat.reshape(-1, self.analysis.ff_width)


def norm_mass_curve(s: Floats) -> Floats:
    """The norm mass of the k neurons with the largest s, for k = 1 to F: s [L, F] -> [L, F]."""
    s2 = np.square(np.sort(s, axis=1)[:, ::-1], dtype=np.float64)
    total = s2.sum(axis=1, keepdims=True)
    curve: Floats = np.divide(
        s2.cumsum(axis=1), total, out=np.ones_like(s2), where=total > 0
    ).astype(np.float32)
    return curve


def jaccard(one: Sequence[NDArray[np.int32]], other: Sequence[NDArray[np.int32]]) -> Floats:
    """|A ∩ B| / |A ∪ B| [L] of the experts [K] of two prompts, layer by layer."""
    both = [np.intersect1d(a, b).size for a, b in zip(one, other, strict=True)]
    either = [np.union1d(a, b).size for a, b in zip(one, other, strict=True)]
    overlaps: Floats = (np.array(both) / np.array(either)).astype(np.float32)
    return overlaps


def draw(prompts: Sequence[PromptAnalysis], out: Path) -> list[Path]:
    """Writes all plots, data.npz and data.json into a directory, which is created if it does not
    exist. The plots of an earlier run are replaced or removed.

    Args:
        prompts: at least one; the heatmaps show the first.

    Returns:
        The files, in the order in which to read them.

    Raises:
        OSError: the directory cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    for earlier in (*out.glob("flocking-layer-*.png"), out / "jaccard.png"):
        earlier.unlink(missing_ok=True)
    figures = {
        f"flocking-layer-{layer}.png": _flocking(prompts[0], layer)
        for layer in sorted(prompts[0].analysis.activations)
    }
    figures["experts.png"] = _experts(prompts[0])
    figures["norm-mass.png"] = _norm_mass(prompts)
    overlaps = np.array(
        [jaccard(one.experts, other.experts) for one, other in combinations(prompts, 2)]
    )  # [pairs, L]
    if len(prompts) > 1:
        figures["jaccard.png"] = _jaccard(prompts, overlaps)
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=DPI)
        plt.close(figure)
    return [out / name for name in figures] + _write_data(prompts, overlaps, out)


def _flocking(prompt: PromptAnalysis, layer: int) -> Figure:
    values = prompt.activations(layer)[:MOST_TOKENS, :MOST_NEURONS]
    width = prompt.analysis.ff_width
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=0,
        vmax=float(np.quantile(values, BRIGHTEST)) or 1.0,
    )
    axes.set_title(f"Relative activations of layer {layer}: {prompt.name}", parse_math=False)
    shown = f" (the first {values.shape[1]} of {width})" if values.shape[1] < width else ""
    axes.set_xlabel(f"feedforward neuron{shown}")
    axes.set_ylabel("token of the prompt")
    figure.colorbar(image, label="|z| / ‖z‖ of the token's activations z", extend="max")
    return figure


def _experts(prompt: PromptAnalysis) -> Figure:
    analysis = prompt.analysis
    chosen = np.zeros((len(analysis.layers), analysis.ff_width), dtype=bool)
    for row, experts in zip(chosen, prompt.experts, strict=True):
        row[experts] = True
    # Relative to equal activations of all neurons, so that layers can be compared.
    even = np.sqrt(np.square(prompt.s).mean(axis=1, keepdims=True))
    strength = np.where(chosen, prompt.s / np.maximum(even, np.finfo(np.float32).tiny), np.nan)
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    cmap = mpl.colormaps["viridis"].with_extremes(bad="white")
    image = axes.imshow(strength, aspect="auto", interpolation="nearest", cmap=cmap, vmin=0, vmax=3)
    kept = f"{analysis.experts_per_layer} of {analysis.ff_width}"
    axes.set_title(
        f"Experts by layer, {kept} neurons (white: not kept): {prompt.name}", parse_math=False
    )
    axes.set_xlabel("feedforward neuron")
    axes.set_ylabel("layer")
    figure.colorbar(image, label="s over the layer's root mean square of s", extend="max")
    return figure


def _norm_mass(prompts: Sequence[PromptAnalysis]) -> Figure:
    curves = np.mean([norm_mass_curve(prompt.s) for prompt in prompts], axis=0)
    layers, width = curves.shape
    density = np.arange(1, width + 1) / width
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    colours = mpl.colormaps["viridis"]
    for layer, curve in enumerate(curves):
        axes.plot(density, curve, color=colours(layer / max(1, layers - 1)), linewidth=1)
    axes.plot(
        density, density, color="grey", linestyle=":", label="if all neurons were equally active"
    )
    axes.set_title(f"Norm mass over density, mean of {len(prompts)} prompt(s)")
    axes.set_xlabel("density, the fraction of neurons kept")
    axes.set_ylabel("norm mass, the fraction of Σ s² kept")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.01)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, layers - 1), "viridis")
    figure.colorbar(scale, ax=axes, label="layer")
    return figure


def _jaccard(prompts: Sequence[PromptAnalysis], pairs: Floats) -> Figure:
    analysis = prompts[0].analysis
    density = analysis.experts_per_layer / analysis.ff_width
    layers = np.arange(pairs.shape[1])
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    axes.fill_between(
        layers, pairs.min(axis=0), pairs.max(axis=0), alpha=0.25, label="least to most"
    )
    axes.plot(layers, pairs.mean(axis=0), marker="o", label=f"mean of {len(pairs)} pair(s)")
    # Two random sets of F·d neurons share F·d² of them on average.
    axes.axhline(
        density / (2 - density), color="grey", linestyle=":", label="two random sets, expected"
    )
    axes.set_title(f"Overlap of the experts of {len(prompts)} prompts at density {density:.2g}")
    axes.set_xlabel("layer")
    axes.set_ylabel("Jaccard similarity |A ∩ B| / |A ∪ B|")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _write_data(prompts: Sequence[PromptAnalysis], overlaps: Floats, out: Path) -> list[Path]:
    first = prompts[0]
    most = max(len(layer) for prompt in prompts for layer in prompt.experts)
    arrays: dict[str, NDArray[np.float32] | NDArray[np.int32]] = {
        "s": np.array([prompt.s for prompt in prompts]),  # [prompts, L, F]
        # [prompts, L, the largest K]; a layer with fewer experts repeats its last one.
        "experts": np.array(
            [
                [np.pad(layer, (0, most - len(layer)), mode="edge") for layer in prompt.experts]
                for prompt in prompts
            ]
        ),
    }
    for layer in first.analysis.activations:
        arrays[f"activations_{layer}"] = first.activations(layer)  # [T, F] of the first prompt
    np.savez_compressed(out / "data.npz", allow_pickle=False, **arrays)
    summary = {
        "ff_width": first.analysis.ff_width,
        "experts_per_layer": first.analysis.experts_per_layer,
        "prompts": [
            {
                "name": prompt.name,
                "tokens": prompt.analysis.texts,
                "norm_mass": [layer.norm_mass for layer in prompt.analysis.layers],
            }
            for prompt in prompts
        ],
        "jaccard": overlaps.tolist(),
    }
    (out / "data.json").write_text(json.dumps(summary), encoding="utf-8")
    return [out / "data.npz", out / "data.json"]
