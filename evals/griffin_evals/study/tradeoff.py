"""Costs and gains by density: KL, top-1 agreement, perplexity and the time of a step."""

from __future__ import annotations

import math
from typing import Any

from griffin_core.calibration.forced_text import forced
from griffin_core.experts.policies import POLICIES
from griffin_core.experts.selection import Selection
from griffin_core.spec.choices import CALIBRATED_POLICIES
from griffin_evals.study.estimates import estimate, paired
from griffin_evals.study.lab import Lab
from griffin_evals.study.measures import divergence, negative_log_likelihood, same_first_choice
from griffin_evals.study.reading import choose, logprobs_of, on_experts, read
from griffin_evals.study.speed import time_steps

DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
POLICY_DENSITIES = (0.7, 0.5, 0.3)
"""The densities at which policies other than topk are measured too."""

POINTS = {"careful": 0.10, "balanced": 0.25, "fast": 0.50}
"""Operating points, and the rise of the perplexity that each allows."""


def settings() -> list[tuple[str, float]]:
    """Policy and density of each setting that is measured beside dense."""
    others = [p for p in POLICIES if p != "topk" and p not in CALIBRATED_POLICIES]
    return [("topk", d) for d in DENSITIES] + [(p, d) for p in others for d in POLICY_DENSITIES]


def measure(lab: Lab) -> dict[str, Any]:
    """KL to dense, top-1 agreement and rise of the negative log-likelihood of texts'
    continuations by policy and density, and tokens per second by density."""
    nll: list[float] = []
    found: dict[tuple[str, float], dict[str, list[float]]] = {
        setting: {"kl": [], "top1": [], "nll": []} for setting in settings()
    }
    for number, text in enumerate(lab.each_text("trade-off")):
        decoder, prompt, rest = lab.model.decoder, lab.prompt(text), lab.continuation(text)
        cache = decoder.new_cache(len(text.token_ids))
        s2 = read(decoder, prompt, cache).s2
        dense = logprobs_of(decoder, read(decoder, rest, cache).hidden)
        cache.rewind(len(prompt))
        targets = text.token_ids[len(prompt) + 1 :]
        nll.append(float(negative_log_likelihood(dense, targets).mean()))
        for (policy, density), rows in found.items():
            name = next(p for p in POLICIES if p == policy)
            experts = choose(decoder, s2, Selection(density=density, policy=name, seed=number))
            slim = forced(decoder, rest, cache, on_experts(decoder, experts))
            rows["kl"].append(float(divergence(dense, slim).mean()))
            rows["top1"].append(float(same_first_choice(dense, slim).mean()))
            rows["nll"].append(float(negative_log_likelihood(slim, targets).mean()))
    quality = [
        {
            "policy": policy,
            "density": density,
            "kl": estimate(rows["kl"]).to_json(),
            "top1": estimate(rows["top1"]).to_json(),
            "nll_rise": paired(rows["nll"], nll).to_json(),
            "kl_above_topk": paired(rows["kl"], found["topk", density]["kl"]).to_json(),
        }
        for (policy, density), rows in found.items()
    ]
    lab.progress("trade-off: timing decode steps")
    sizes = lab.sizes
    speed = time_steps(
        lab.timed(), lab.prompt(lab.texts[0]), DENSITIES, sizes.speed_rounds, sizes.speed_steps
    )
    return {"dense_nll": estimate(nll).to_json(), "quality": quality, "speed": speed}


def operating_point(quality: list[dict[str, Any]], rise: float) -> float | None:
    """The lowest density at which, and at all measured ones above it, topk raises the perplexity
    by no more than a share, with two standard errors added; None if there is none.

    Args:
        quality: as ``measure`` gives it.
        rise: 0.1 for 10 %.
    """
    point = None
    topk = [row for row in quality if row["policy"] == "topk"]
    for row in sorted(topk, key=lambda row: -row["density"]):
        of = row["nll_rise"]
        if of["se"] is None or of["mean"] + 2 * of["se"] > math.log1p(rise):
            break
        point = float(row["density"])
    return point
