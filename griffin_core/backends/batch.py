"""A step of the model, in integers: which tokens run, where their keys and values lie, and on which
experts they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_core.backends.transfers import on_device, sent
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import NULL_SLOT

TOKENS, POSITIONS, CACHED, KV_SLOTS, SLIM_IDS, SLOTS = range(6)
"""Rows of ``RowTable.table``."""

DRAWN = -1
"""In place of a token id: the token that the row's sampler slot drew last."""

DENSE = 0
"""The slim id of all neurons."""


@dataclass(frozen=True, kw_only=True)
class StepSequence:
    """The part of a step that belongs to one sequence.

    Args:
        first_slot: KV slot of the sequence's first token. The pool must have room for the new ones.
        cached: tokens of the sequence that the pool holds already.
        token_ids: the tokens to run, at least one; ``DRAWN`` for what the slot drew last.
        slim_id: what its FF runs on; ``DENSE`` for all neurons.
        slot: the sampler slot that draws the token after the last of these; None to draw none.
    """

    first_slot: int
    cached: int
    token_ids: tuple[int, ...] = (DRAWN,)
    slim_id: int = DENSE
    slot: int | None = None

    @staticmethod
    def next_of(
        cache: KvCache,
        token_ids: Sequence[int] = (DRAWN,),
        *,
        slim_id: int = DENSE,
        slot: int | None = None,
    ) -> StepSequence:
        """The next tokens of the sequence that a cache holds.

        Raises:
            ValueError: the cache has no room for them.
        """
        end = cache.length + len(token_ids)
        if end > cache.capacity:
            raise ValueError(f"tokens {cache.length}..{end} do not fit a cache of {cache.capacity}")
        return StepSequence(
            first_slot=cache.first_slot,
            cached=cache.length,
            token_ids=tuple(token_ids),
            slim_id=slim_id,
            slot=slot,
        )


PADDING = StepSequence(first_slot=NULL_SLOT, cached=0, token_ids=(0,))
"""A sequence of one row that belongs to no session."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Sequences of one step. Their tokens are the N rows of the batch, sequence after sequence.

    Args:
        padding: the sampler slot of rows that draw nothing.
    """

    sequences: tuple[StepSequence, ...]
    padding: int = 0

    @property
    def rows(self) -> int:
        """N."""
        return sum(len(each.token_ids) for each in self.sequences)

    def columns(self) -> list[tuple[int, int, int, int, int, int]]:
        """For each row its column of ``RowTable.table``."""
        columns = []
        for each in self.sequences:
            last = len(each.token_ids) - 1
            slot = self.padding if each.slot is None else each.slot
            for place, token in enumerate(each.token_ids):
                columns.append(
                    (
                        token,
                        each.cached + place,
                        each.cached,
                        each.first_slot,
                        each.slim_id,
                        slot if place == last else self.padding,
                    )
                )
        return columns


@dataclass(frozen=True, kw_only=True)
class RowTable:
    """What each of the N rows of a step is, on the device.

    Args:
        table: [6, N] int64, rows as numbered by the constants of this module.
        batch: the same on the host; None in a captured step, whose table is filled later.
    """

    table: Tensor
    batch: StepBatch | None = None

    @property
    def most_new_tokens(self) -> int:
        """Most rows of one sequence; 1 if it is not known."""
        if self.batch is None:
            return 1
        return max(len(each.token_ids) for each in self.batch.sequences)

    @staticmethod
    def of(batch: StepBatch, device: torch.device) -> RowTable:
        """The table of a batch; a GPU is not waited for."""
        table = torch.tensor(batch.columns(), dtype=torch.int64).t().contiguous()
        return RowTable(table=sent(table, device), batch=batch)

    @property
    def token_ids(self) -> Tensor:
        """[N], as are the others: the tokens to run, or ``DRAWN``."""
        return self.table[TOKENS]

    @property
    def positions(self) -> Tensor:
        """Position of each token in its sequence."""
        return self.table[POSITIONS]

    @property
    def cached(self) -> Tensor:
        """Tokens of the row's sequence that the pool held before this step."""
        return self.table[CACHED]

    @property
    def kv_slots(self) -> Tensor:
        """KV slot of the first token of the row's sequence."""
        return self.table[KV_SLOTS]

    @property
    def slim_ids(self) -> Tensor:
        """What the row's FF runs on."""
        return self.table[SLIM_IDS]

    @property
    def slots(self) -> Tensor:
        """The sampler slot that draws the token after the row's."""
        return self.table[SLOTS]


@dataclass(frozen=True, kw_only=True)
class RowRuns:
    """R runs of rows, one after the other, that fill a batch.

    Args:
        bounds: R + 1 numbers: run r is rows bounds[r] to bounds[r + 1].
        on_device: the same, [R + 1] int32.
    """

    bounds: tuple[int, ...]
    on_device: Tensor

    @staticmethod
    def of(bounds: Sequence[int], device: torch.device) -> RowRuns:
        """Runs from bounds on the host; a GPU is not waited for."""
        return RowRuns(bounds=tuple(bounds), on_device=on_device(bounds, torch.int32, device))
