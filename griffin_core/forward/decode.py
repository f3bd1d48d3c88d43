"""Decode steps run a few new tokens of many sequences through the model, each on its own experts.

``step_logits`` is the one forward pass of a step. An ``EagerStep`` runs it operation by operation
on any device; ``graphs.GraphStep`` replays it as captured graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from griffin_core.backends.base import RunFF
from griffin_core.backends.batch import RowTable, StepBatch, StepSequence
from griffin_core.backends.transfers import on_device
from griffin_core.forward.draws import Draw, Draws, drawn_rows
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.model.decoder import Decoder
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.base import SlimTable
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.views import WholeView


class Stepper(Protocol):
    """Runs steps of the engine's loop."""

    @property
    def most_rows(self) -> int | None:
        """The number of rows above which a step costs more than two steps of fewer rows; None if
        there is no such number."""
        ...

    def launch(
        self, sequences: Sequence[StepSequence], top_logprobs: Sequence[int | None]
    ) -> Draws:
        """Runs the tokens of all sequences in one batch, and samples the next token of each
        sequence with a sampler slot. The device may still be running on return.

        Args:
            top_logprobs: for each sequence the number of top log-probabilities to report with its
                token; None to report no log-probabilities, or for a sequence that draws no token.

        Raises:
            DrawLost: tokens were sampled and cannot be read: the sequences must end.
            Exception: anything else. The same sequences may be run again.
        """
        ...


def token_ids(rows: RowTable, drawn: Tensor) -> Tensor:
    """Returns the tokens [N] to run: those in the table, or the token that a row's slot drew last.

    A slot whose logits were not finite has drawn -1. Its session is about to end with an error, and
    token 0 runs in its place.
    """
    given = rows.token_ids
    return torch.where(given < 0, drawn[rows.slots].clamp_(min=0), given)


def step_logits(
    decoder: Decoder, pool: KvPool, rows: RowTable, ids: Tensor, ff: Callable[[int], RunFF]
) -> Tensor:
    """Returns the logits [N, V] float32 after each of ids [N], and stores their keys and values in
    the pool."""
    x = decoder.embed(ids, rows.positions)
    attention = decoder.backend.decode_attention(decoder.spec, pool, rows)
    return decoder.logits(decoder.forward(x, attention, ff))


@dataclass(frozen=True, kw_only=True)
class EagerStep:
    """Runs a step operation by operation, on any device.

    Args:
        slims: the table of slim ids.
    """

    decoder: Decoder
    pool: KvPool
    sampler: Sampler
    slims: SlimTable
    most_rows: ClassVar[int | None] = None

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
        table = rows.table
        if order != sorted(order):
            index = on_device(rows_back(ordered, order), torch.int64, logits.device)
            logits, table = logits[index], table[:, index]
        return sample(self.sampler, logits, RowTable(table=table), sequences, top_logprobs)


def sample(
    sampler: Sampler,
    logits: Tensor,
    rows: RowTable,
    sequences: Sequence[StepSequence],
    top_logprobs: Sequence[int | None],
) -> Draw:
    """Samples the next token of each sequence that has a sampler slot.

    Args:
        logits: [N, V] float32.
        rows: the N rows, in the order of the sequences.

    Raises:
        DrawLost: tokens were sampled and cannot be read.
    """
    drawn = drawn_rows(sequences)
    slots, positions, own = rows.slots, rows.positions + 1, logits
    if len(drawn) < len(logits):
        index = on_device(drawn, torch.int64, logits.device)
        slots, positions, own = slots[index], positions[index], logits[index]
    tokens = sampler.sample(own, slots, positions) if drawn else slots
    return Draw.of(tokens, logits, sequences, top_logprobs)


def order_of(slims: SlimTable, sequences: Sequence[StepSequence]) -> list[int]:
    """Returns the order of sequences in a step: those that share a product are adjacent."""
    return sorted(range(len(sequences)), key=lambda i: slims.order(sequences[i].slim_id))


def rows_back(ordered: Sequence[StepSequence], order: Sequence[int]) -> list[int]:
    """Returns, for each row in the caller's order, its row in the step.

    Args:
        ordered: the sequences in the order of the step.
        order: for each of them its index in the caller's order.
    """
    spans: dict[int, range] = {}
    begin = 0
    for place, each in zip(order, ordered, strict=True):
        spans[place] = range(begin, begin + len(each.token_ids))
        begin += len(each.token_ids)
    return [row for place in sorted(spans) for row in spans[place]]


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """Tokens to run of one sequence, for callers without an engine.

    Args:
        cache: holds the tokens before these, and has room for these.
        view: the FF block of each layer. Sequences with the same list object share every product.
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
    has advanced, and the same tokens may be run again.

    Args:
        steps: the sequences; their caches are in one pool.
        table: keeps the masks of sequences that run zeroed from call to call.

    Returns:
        Logits [T, V] float32 for each sequence, a row for each of its T tokens.

    Raises:
        ValueError: the caches are in different pools, or the tokens do not fit a cache.
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
