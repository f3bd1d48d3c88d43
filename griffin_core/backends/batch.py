"""A step of the model as integers: the tokens to run, where their keys and values are stored, and
the experts that they run on."""

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
"""Stands in place of a token id for the token that the row's sampler slot drew last."""

DENSE = 0
"""The slim id that stands for all neurons."""


@dataclass(frozen=True, kw_only=True)
class StepSequence:
    """The part of a step that belongs to one sequence.

    Args:
        first_slot: KV slot of the sequence's first token. The pool must have room for the new ones.
        cached: tokens of the sequence that the pool holds already.
        token_ids: the tokens to run, at least one; ``DRAWN`` for the token that the slot drew last.
        slim_id: the neurons that its FF runs on; ``DENSE`` for all.
        slot: the sampler slot that draws the token after the last of these; None to draw no token.
        draws_all: the slot draws the token after each of these, from the state that it has now.
            What it drew last is then not to be run as ``DRAWN``.
    """

    first_slot: int
    cached: int
    token_ids: tuple[int, ...] = (DRAWN,)
    slim_id: int = DENSE
    slot: int | None = None
    draws_all: bool = False

    @staticmethod
    def next_of(
        cache: KvCache,
        token_ids: Sequence[int] = (DRAWN,),
        *,
        slim_id: int = DENSE,
        slot: int | None = None,
        draws_all: bool = False,
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
            draws_all=draws_all,
        )


PADDING = StepSequence(first_slot=NULL_SLOT, cached=0, token_ids=(0,))
"""A sequence of one row that belongs to no session."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The sequences of one step. Their tokens are the N rows of the batch, sequence after sequence.

    Args:
        padding: the sampler slot of rows that draw no token.
    """

    sequences: tuple[StepSequence, ...]
    padding: int = 0

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return sum(len(each.token_ids) for each in self.sequences)

    def columns(self) -> list[tuple[int, int, int, int, int, int]]:
        """Returns the column of ``RowTable.table`` for each row."""
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
                        slot if place == last or each.draws_all else self.padding,
                    )
                )
        return columns


@dataclass(frozen=True, kw_only=True)
class RowTable:
    """The description of the N rows of a step, on the device.

    Args:
        table: [6, N] int64; its rows are numbered by the constants of this module.
        batch: the same on the host; None in a captured step, whose table is filled before each
            replay.
    """

    table: Tensor
    batch: StepBatch | None = None

    @property
    def most_new_tokens(self) -> int:
        """The most rows of one sequence; 1 if that is unknown."""
        if self.batch is None:
            return 1
        return max(len(each.token_ids) for each in self.batch.sequences)

    @staticmethod
    def of(batch: StepBatch, device: torch.device) -> RowTable:
        """Copies a batch to the device as a table, without waiting for a GPU."""
        table = torch.tensor(batch.columns(), dtype=torch.int64).t().contiguous()
        return RowTable(table=sent(table, device), batch=batch)

    @property
    def token_ids(self) -> Tensor:
        """[N], as are the other properties: the tokens to run, or ``DRAWN``."""
        return self.table[TOKENS]

    @property
    def positions(self) -> Tensor:
        """The position of each token in its sequence."""
        return self.table[POSITIONS]

    @property
    def cached(self) -> Tensor:
        """The number of tokens of the row's sequence that the pool held before this step."""
        return self.table[CACHED]

    @property
    def kv_slots(self) -> Tensor:
        """The KV slot of the first token of the row's sequence."""
        return self.table[KV_SLOTS]

    @property
    def slim_ids(self) -> Tensor:
        """The slim id that the row's FF runs on."""
        return self.table[SLIM_IDS]

    @property
    def slots(self) -> Tensor:
        """The sampler slot that draws the token after the row's token."""
        return self.table[SLOTS]


@dataclass(frozen=True, kw_only=True)
class RowRuns:
    """R runs of consecutive rows that together make up a batch.

    Args:
        bounds: R + 1 row numbers: run r is rows bounds[r] to bounds[r + 1].
        on_device: the same on the device, [R + 1] int32.
    """

    bounds: tuple[int, ...]
    on_device: Tensor

    @staticmethod
    def of(bounds: Sequence[int], device: torch.device) -> RowRuns:
        """Makes runs from bounds on the host, without waiting for a GPU."""
        return RowRuns(bounds=tuple(bounds), on_device=on_device(bounds, torch.int32, device))
