"""Batch-invariant steps: a session's output is bitwise independent of the other sessions in the
batch.

The order in which a library sums the terms of a matrix product depends on the number of rows. So
every product of such a step has the same number of rows: those of some sessions, filled up with
padding. Everything else is either exact (sums, masks, copies) or computed for each row alone
(attention, norms, activations). All sessions run on all weights, dense or zeroed outside their set,
because a product with a copy of a set sums in another order, too.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from griffin_core.backends.base import FeedForward, RunFF
from griffin_core.backends.batch import PADDING, RowTable, StepBatch, StepSequence
from griffin_core.forward.decode import (
    EagerStep,
    order_of,
    rows_back,
    sample,
    step_logits,
    token_ids,
)
from griffin_core.forward.draws import Draws
from griffin_core.kv.pool import KvPool
from griffin_core.model.decoder import Decoder
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.corrected import corrected_rows
from griffin_core.slim.zeroed import RowMasks
from griffin_core.spec.weights import Norm

ROWS = 8
"""The number of rows of each product. For SmolLM2 in bfloat16, steps of 1, 4 and 16 sessions took
1.8, 1.4 and 1.3 times as long as normal steps; with products of 16 rows 2.1, 1.5 and 1.0 times; and
with the one-row kernel called for each row 1.0, 2.2 and 3.7 times."""


class InvariantStep:
    """A ``Stepper`` in which no row's result depends on other rows.

    Sequences that draw a token run together, in products of ``ROWS`` rows. A sequence that draws no
    token (a score) must be the only one of its step, and runs by itself.

    Args:
        slims: the table of slim ids; its views run dense or zeroed.
    """

    def __init__(
        self, *, decoder: Decoder, pool: KvPool, sampler: Sampler, slims: BlockTable
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._sampler = sampler
        self.slims = slims
        self.most_rows: int | None = None
        self._alone = EagerStep(decoder=decoder, pool=pool, sampler=sampler, slims=slims)
        self._masks: dict[int, RowMasks] = defaultdict(RowMasks)  # by first row of a product

    @torch.inference_mode()
    def launch(
        self, sequences: Sequence[StepSequence], top_logprobs: Sequence[int | None]
    ) -> Draws:
        """See ``Stepper``."""
        if any(each.slot is None for each in sequences):
            assert len(sequences) == 1
            return self._alone.launch(sequences, top_logprobs)
        order = order_of(self.slims, sequences)
        ordered = [sequences[i] for i in order]
        parts = [
            self._product(first, ordered[first : first + ROWS])
            for first in range(0, len(ordered), ROWS)
        ]
        index = torch.tensor(rows_back(ordered, order))
        logits = torch.cat([logits for logits, _ in parts])[index]
        table = torch.cat([rows.table for _, rows in parts], dim=1)[:, index]
        return sample(self._sampler, logits, RowTable(table=table), sequences, top_logprobs)

    def _product(self, first: int, sequences: Sequence[StepSequence]) -> tuple[Tensor, RowTable]:
        """Returns the logits [n, V] of up to ``ROWS`` rows, and their table."""
        missing = ROWS - len(sequences)
        batch = StepBatch(
            sequences=(PADDING,) * missing + tuple(sequences), padding=self._sampler.padding
        )
        rows = RowTable.of(batch, self._decoder.device)
        ids = token_ids(rows, self._sampler.drawn)
        slim_ids = [each.slim_id for each in sequences]
        keep = self.slims.keeps(slim_ids, self._masks[first])
        corrections = [self.slims.correction(each) for each in slim_ids]
        ff = corrected_rows(
            self._decoder.backend,
            [None] * missing + corrections,
            partial(_by_rows, self._decoder, keep),
        )
        logits = step_logits(self._decoder, self._pool, rows, ids, ff)
        return logits[missing:], RowTable(table=rows.table[:, missing:])

    @torch.inference_mode()
    def rows_stay_apart(self) -> bool:
        """Tests whether batch invariance holds on this machine: a token's logits must be the same
        in every row of a product, whatever the other tokens are. Call it before the first
        session."""
        draw = random.Random(0)
        vocab_size = self._decoder.spec.vocab_size
        token, *others = (draw.randrange(vocab_size) for _ in range(ROWS))
        alone = self._trial([token])[0]
        beside = [
            self._trial([*others[:place], token, *others[place:]])[place] for place in range(ROWS)
        ]
        return all(torch.equal(alone, own) for own in beside)

    def _trial(self, tokens: Sequence[int]) -> Tensor:
        """Returns the logits [N, V] of a step that runs each token as the first of a sequence."""
        pool = self._decoder.new_pool(len(tokens))
        sequences = [
            StepSequence(first_slot=pool.allocate(1).first_slot, cached=0, token_ids=(token,))
            for token in tokens
        ]
        trial = InvariantStep(
            decoder=self._decoder, pool=pool, sampler=self._sampler, slims=self.slims
        )
        return trial._product(0, sequences)[0]


def _by_rows(decoder: Decoder, keep: Sequence[Tensor] | None, layer: int) -> RunFF:
    return partial(_rows, decoder.layers[layer].ff, None if keep is None else keep[layer])


def _rows(
    ff: FeedForward,
    keep: Tensor | None,
    x: Tensor,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    return ff.by_rows(x, keep, norm, residual)
