"""Decode steps: a few new tokens of many sequences through the model, each on its own experts.

``step_logits`` is the one forward pass of a step. An ``EagerStep`` runs it operation by operation,
on any device; ``graphs.GraphStep`` replays it as captured graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from griffin_core.backends.base import RunFF
from griffin_core.backends.batch import RowTable, StepBatch, StepSequence
from griffin_core.backends.transfers import on_device
from griffin_core.forward.draws import Draw, Draws
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.model.decoder import Decoder
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.base import SlimTable
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.views import WholeView


class Stepper(Protocol):
    """Runs steps of the engine's loop."""

    def launch(
        self, sequences: Sequence[StepSequence], top_logprobs: Sequence[int | None]
    ) -> Draws:
        """Runs the tokens of all sequences in one batch and draws the next token of those that have
        a sampler slot. The device may still be at work on return.

        Args:
            top_logprobs: for each sequence how many log-probabilities to report with its token;
                None for none at all.

        Raises:
            DrawLost: tokens were drawn and cannot be read: the sequences must end.
            Exception: anything else. The same sequences may be run again.
        """
        ...


def token_ids(rows: RowTable, drawn: Tensor) -> Tensor:
    """The tokens [N] to run: those given, or what the rows' slots drew last.

    A row whose logits were not finite has drawn -1; its session is about to be told, and token 0
    runs in its place.
    """
    given = rows.token_ids
    return torch.where(given < 0, drawn[rows.slots].clamp_(min=0), given)


def step_logits(
    decoder: Decoder, pool: KvPool, rows: RowTable, ids: Tensor, ff: Callable[[int], RunFF]
) -> Tensor:
    """Logits [N, V] float32 after each of ids [N]; stores their keys and values in the pool."""
    x = decoder.embed(ids, rows.positions)
    attention = decoder.backend.decode_attention(decoder.spec, pool, rows)
    return decoder.logits(decoder.forward(x, attention, ff))


@dataclass(frozen=True, kw_only=True)
class EagerStep:
    """Runs a step operation by operation, on any device.

    Args:
        slims: what the slim ids stand for.
    """

    decoder: Decoder
    pool: KvPool
    sampler: Sampler
    slims: SlimTable

    @torch.inference_mode()
    def launch(
        self, sequences: Sequence[StepSequence], top_logprobs: Sequence[int | None]
    ) -> Draws:
        """See ``Stepper``."""
        order = order_of(self.slims, sequences)
        ordered = tuple(sequences[i] for i in order)
        rows = RowTable.of(
            StepBatch(sequences=ordered, padding=self.sampler.padding), self.decoder.device
        )
        ids = token_ids(rows, self.sampler.drawn)
        logits = step_logits(self.decoder, self.pool, rows, ids, self.slims.run(rows))
        slots, positions = rows.slots, rows.positions + 1
        if order != sorted(order):
            back = rows_back(ordered, order)
            index = on_device(back, torch.int64, logits.device)
            logits, slots, positions = logits[index], slots[index], positions[index]
        tokens = self.sampler.sample(logits, slots, positions)
        return Draw.of(tokens, logits, sequences, top_logprobs)


def order_of(slims: SlimTable, sequences: Sequence[StepSequence]) -> list[int]:
    """The order in which a step has its sequences: those of one product side by side."""
    return sorted(range(len(sequences)), key=lambda i: slims.order(sequences[i].slim_id))


def rows_back(ordered: Sequence[StepSequence], order: Sequence[int]) -> list[int]:
    """For each row in the order that was asked for, its row in the step.

    Args:
        ordered: the sequences as the step has them.
        order: for each of them its place in what was asked for.
    """
    spans: dict[int, range] = {}
    begin = 0
    for place, each in zip(order, ordered, strict=True):
        spans[place] = range(begin, begin + len(each.token_ids))
        begin += len(each.token_ids)
    return [row for place in sorted(spans) for row in spans[place]]


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """Given tokens of one sequence, for callers without an engine.

    Args:
        cache: holds what is before them; must have room for them.
        view: the FF block of each layer. Sequences with the same list share every product.
        token_ids: at least one.
    """

    cache: KvCache
    view: Sequence[RunFF]
    token_ids: Sequence[int]


@torch.inference_mode()
def decode_tokens(
    decoder: Decoder, steps: Sequence[StepTokens], table: BlockTable | None = None
) -> list[Tensor]:
    """Runs each sequence's tokens after its cached ones, all in one batch. If it raises, no cache
    has moved on, and the same tokens may be run again.

    Args:
        steps: their caches are of one pool.
        table: keeps masks from call to call, for sequences that run zeroed.

    Returns:
        Logits [T, V] float32 for each sequence, one row after each of its tokens.

    Raises:
        ValueError: the caches are of different pools, or tokens do not fit one.
    """
    pool, table = steps[0].cache.pool, table or BlockTable(decoder)
    views: dict[int, WholeView] = {}
    sequences = []
    for step in steps:
        if step.cache.pool is not pool:
            raise ValueError("caches of different pools cannot run in one batch")
        view = views.get(id(step.view))
        if view is None:
            view = views[id(step.view)] = WholeView(step.view)
            if step.view[0] is not decoder.layers[0].ff:
                view.slim_id = table.add(view)
        sequences.append(StepSequence.next_of(step.cache, step.token_ids, slim_id=view.slim_id))
    order = order_of(table, sequences)
    ordered = tuple(sequences[i] for i in order)
    rows = RowTable.of(StepBatch(sequences=ordered), decoder.device)
    logits = step_logits(decoder, pool, rows, rows.token_ids, table.run(rows))
    parts = torch.split_with_sizes(logits, [len(each.token_ids) for each in ordered])
    for step in steps:
        step.cache.advance(len(step.token_ids))
    by_place = dict(zip(order, parts, strict=True))
    return [by_place[place] for place in range(len(steps))]
