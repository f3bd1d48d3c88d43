"""Flocking by layer: how far a prompt's tokens activate the same neurons."""

from __future__ import annotations

from typing import Any

import torch

from griffin_evals.study.estimates import band, estimate, paired
from griffin_evals.study.lab import Lab
from griffin_evals.study.measures import agreement, norm_mass, permuted, steady_share, strongest
from griffin_evals.study.reading import choose, read

MEASURES = ("agreement", "norm_mass", "steady")


def measure(lab: Lab) -> dict[str, Any]:
    """Agreement, norm mass and steady share of every layer, and the same of activations that are
    shuffled among the neurons for each token (``null``)."""
    found: dict[str, dict[str, list[list[float]]]] = {
        kind: {name: [] for name in MEASURES} for kind in ("texts", "null")
    }
    for number, text in enumerate(lab.each_text("flocking")):
        decoder = lab.model.decoder
        prompt = lab.prompt(text)
        span = read(decoder, prompt, decoder.new_cache(len(prompt)), watch=True)
        rows: dict[str, dict[str, list[float]]] = {
            kind: {name: [] for name in MEASURES} for kind in found
        }
        for layer, values in enumerate(span.activations):
            seed = number * len(span.activations) + layer
            for kind, z in (("texts", values), ("null", permuted(values, seed))):
                s2 = z.square().sum(dim=0, keepdim=True)
                experts = choose(decoder, s2, lab.selection)
                own = strongest(z, lab.experts)
                rows[kind]["agreement"].append(agreement(own, experts[0]))
                rows[kind]["norm_mass"].append(float(norm_mass(s2, experts)[0]))
                rows[kind]["steady"].append(steady_share(own))
        for kind, of_kind in rows.items():
            for name, by_layer in of_kind.items():
                found[kind][name].append(by_layer)
    means = {
        kind: {name: [_mean(row) for row in rows] for name, rows in of_kind.items()}
        for kind, of_kind in found.items()
    }
    return {
        "by_layer": {
            kind: {name: band(rows) for name, rows in of_kind.items()}
            for kind, of_kind in found.items()
        },
        "mean": {
            kind: {name: estimate(values).to_json() for name, values in of_kind.items()}
            for kind, of_kind in means.items()
        },
        "above_null": {
            name: paired(means["texts"][name], means["null"][name]).to_json() for name in MEASURES
        },
        "early_to_late": _thirds(found["texts"]["agreement"]),
    }


def _thirds(rows: list[list[float]]) -> dict[str, Any]:
    """The agreement of the last third of the layers minus that of the first."""
    third = max(1, len(rows[0]) // 3)
    late, early = [_mean(row[-third:]) for row in rows], [_mean(row[:third]) for row in rows]
    return paired(late, early).to_json()


def _mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
