"""Timing steps of the engine's loop by themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence

from griffin_core.backends.base import RunFF
from griffin_core.forward.decode import Stepper, StepRow
from griffin_core.kv.cache import KvCache
from griffin_core.model.decoder import Decoder
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler


def greedy_sampler(decoder: Decoder, slots: int) -> Sampler:
    """A sampler all of whose slots are greedy."""
    vocabulary = decoder.spec.vocabulary
    sampler = Sampler(slots=slots, vocabulary=vocabulary, backend=decoder.backend)
    for slot in range(slots):
        sampler.open(slot, SamplingParams(), [])
    return sampler


def step_s(
    step: Stepper,
    caches: Sequence[KvCache],
    views: Sequence[Sequence[RunFF]],
    *,
    context: int,
    steps: int,
) -> float:
    """Seconds of a step, the mean over ``steps`` after ``context`` tokens, the host's work
    included. Each is launched before the tokens of the last are read, as the engine does on a GPU.
    """
    rows = [
        StepRow(cache=cache, view=view, slot=slot)
        for slot, (cache, view) in enumerate(zip(caches, views, strict=True))
    ]
    for cache in caches:
        cache.length = context
    clock = time.perf_counter()
    before = step.launch(rows)
    for _ in range(steps - 1):
        now = step.launch(rows)
        before.wait()
        before = now
    before.wait()
    return (time.perf_counter() - clock) / steps
