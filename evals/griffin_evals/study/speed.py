"""Times decode steps by density: one session, on packed copies of its experts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from griffin_core.backends.base import RunFF
from griffin_core.experts.selection import Selection
from griffin_core.forward.decode import StepTokens, decode_tokens
from griffin_core.kv.cache import KvCache
from griffin_core.model.load import Model
from griffin_core.slim.packed import Packed
from griffin_evals.study.estimates import estimate
from griffin_evals.study.reading import choose, read


def time_steps(
    model: Model, prompt: Sequence[int], densities: Sequence[float], rounds: int, steps: int
) -> dict[str, Any]:
    """Tokens per second of decode steps after a prompt, dense and by density. Every round times
    all of them, so that other load on the machine affects all alike. The error is over rounds.

    Args:
        densities: those to time beside 1.0.
        steps: decode steps of each round, of which the median counts.
    """
    decoder = model.decoder
    cache = decoder.new_cache(len(prompt) + steps)
    s2 = read(decoder, prompt, cache).s2
    views: dict[float, Sequence[RunFF]] = {1.0: [layer.ff for layer in decoder.layers]}
    for density in densities:
        experts = choose(decoder, s2, Selection(density=density))
        layers = zip(decoder.layers, experts, strict=True)
        views[density] = [Packed().build(layer, own, "gemv") for layer, own in layers]
    took: dict[float, list[float]] = {density: [] for density in views}
    for number in range(rounds + 1):
        for density, view in views.items():
            seconds = _median_step(model, cache, view, prompt, steps)
            if number:  # the first round warms up
                took[density].append(seconds)
    return {
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "by_density": [
            {
                "density": density,
                "tokens_per_s": estimate([1 / s for s in seconds]).to_json(),
                "speedup": estimate(
                    [dense / s for dense, s in zip(took[1.0], seconds, strict=True)]
                ).to_json(),
            }
            for density, seconds in took.items()
        ],
    }


def _median_step(
    model: Model, cache: KvCache, view: Sequence[RunFF], prompt: Sequence[int], steps: int
) -> float:
    """Median seconds of a step, including the choice of its token."""
    took = []
    token = prompt[-1]
    for _ in range(steps):
        began = time.perf_counter()
        step = StepTokens(cache=cache, view=view, token_ids=[token])
        token = int(decode_tokens(model.decoder, [step])[0].argmax())
        took.append(time.perf_counter() - began)
    cache.rewind(len(prompt))
    return median(took)
