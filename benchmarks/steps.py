"""Times steps of the engine's loop without an engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from griffin_core.backends.base import Layout
from griffin_core.backends.batch import StepSequence
from griffin_core.experts.selection import Selection, select_experts
from griffin_core.forward.decode import EagerStep
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.model.decoder import Decoder
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.base import SlimForm
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.packed import Packed
from griffin_core.slim.views import WholeView


def greedy_sampler(decoder: Decoder, slots: int) -> Sampler:
    """Returns a sampler with greedy slots only."""
    vocab_size = decoder.spec.vocab_size
    sampler = Sampler(slots=slots, vocab_size=vocab_size, backend=decoder.backend)
    for slot in range(slots):
        sampler.open(slot, SamplingParams(), [])
    return sampler


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A decode step as in the engine, with its KV pool and its slim table.

    Args:
        step: a ``GraphStep`` or an ``EagerStep``.
        slims: an ``IndexTable`` or a ``BlockTable``.
        form: builds the blocks; None if the table itself holds the sets.
    """

    decoder: Decoder
    pool: KvPool
    step: Any
    slims: Any
    form: SlimForm | None

    def cache(self, tokens: int, capacity: int) -> KvCache:
        """Returns a cache of random keys and values."""
        cache = self.pool.allocate(capacity)
        for layer in range(len(self.decoder.layers)):
            cache.slice(layer, 0, tokens).normal_()
        cache.advance(tokens)
        return cache

    def view(self, density: float, layout: Layout) -> WholeView:
        """Returns a view of a random expert set, or of all neurons at density 1. It keeps its slim
        id for as long as it lives.

        Args:
            layout: the number of rows that it is laid out for.
        """
        decoder = self.decoder
        if density == 1.0:
            return WholeView([layer.ff for layer in decoder.layers])
        shape = (len(decoder.layers), decoder.spec.intermediate_size)
        score = torch.rand(shape, device=decoder.device)
        slim = select_experts(score, Selection(density=density), magnitude=decoder.magnitudes)
        blocks = []
        if self.form is not None:
            pairs = zip(decoder.layers, slim.layers, strict=True)
            blocks = [self.form.build(layer, experts, layout) for layer, experts in pairs]
        view = WholeView(blocks, slim)
        view.slim_id = self.slims.add(view)
        return view


def steps_of(decoder: Decoder, *, sessions: int, tokens: int, sets: int) -> Steps:
    """Returns the steps of a model on its device; on a GPU it captures graphs first.

    Args:
        sessions: the most sessions in a step.
        tokens: the size of the KV pool.
        sets: the most expert sets at once.
    """
    pool, sampler = decoder.new_pool(tokens), greedy_sampler(decoder, sessions)
    if not decoder.backend.captures:
        blocks = BlockTable(decoder)
        eager = EagerStep(decoder=decoder, pool=pool, sampler=sampler, slims=blocks)
        return Steps(decoder=decoder, pool=pool, step=eager, slims=blocks, form=Packed())
    from griffin_core.forward.graphs import GraphStep  # noqa: PLC0415  # needs triton
    from griffin_core.slim.indexed import IndexTable  # noqa: PLC0415

    table = IndexTable(decoder, sets=sets)
    step = GraphStep(
        decoder=decoder, pool=pool, sampler=sampler, slims=table, max_sequences=sessions
    )
    return Steps(decoder=decoder, pool=pool, step=step, slims=table, form=None)


def step_s(
    step: Any,
    caches: Sequence[KvCache],
    views: Sequence[WholeView],
    *,
    context: int,
    steps: int,
) -> float:
    """Returns the seconds of a step, the mean over ``steps`` after ``context`` tokens, the host's
    work included. Each step is launched before the tokens of the previous one are read, as in the
    engine on a GPU.
    """
    tops = [None] * len(caches)

    def launch() -> Any:
        draws = step.launch(
            [
                StepSequence(
                    first_slot=cache.first_slot,
                    cached=cache.length,
                    slim_id=view.slim_id,
                    slot=slot,
                )
                for slot, (cache, view) in enumerate(zip(caches, views, strict=True))
            ],
            tops,
        )
        for cache in caches:
            cache.advance(1)
        return draws

    for cache in caches:
        cache.rewind(context)
    clock = time.perf_counter()
    before = launch()
    for _ in range(steps - 1):
        now = launch()
        before.wait()
        before = now
    before.wait()
    return (time.perf_counter() - clock) / steps
