"""What is kept for each sampler slot on a GPU: see ``backends.base.SamplerSlots``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from griffin_core.backends.cuda.sampling import (
    count_bins,
    finish,
    process_logits,
    race,
)
from griffin_core.backends.cuda.sampling_table import (
    BIASED,
    BINS,
    BLOCK,
    FIELDS,
    MOST_SPLITS,
)
from griffin_core.backends.cuda.tuning import (
    pdl_options,
)
from griffin_core.backends.transfers import float_bits, on_device

if TYPE_CHECKING:
    from griffin_core.sampling.params import SamplingParams


class CudaSlots:
    """The sampling state of each slot, on the device at fixed addresses. See ``Sampler``.

    Args:
        slots: S, the number of sessions; slot S always exists and is greedy.
        vocab_size: V.
    """

    def __init__(self, *, slots: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self.drawn = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._table = torch.zeros((slots + 1, FIELDS), dtype=torch.int32, device=device)
        self._bias = torch.zeros((slots + 1, vocab_size), dtype=torch.float32, device=device)
        self._seen = torch.zeros((slots + 1, vocab_size), dtype=torch.int32, device=device)
        """Bit 0: in the prompt. The other bits: times drawn."""
        self._params: dict[int, SamplingParams] = {}

    @property
    def nbytes(self) -> int:
        """See ``Sampler``."""
        return self._bias.nbytes + self._seen.nbytes + self._table.nbytes + self.drawn.nbytes

    @property
    def in_use(self) -> frozenset[int]:
        """See ``Sampler``."""
        rows = self._table.any(dim=1).nonzero()[:, 0].tolist()
        return frozenset((*rows, *self._params))

    def open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None:
        """See ``Sampler``."""
        self._params[slot] = params
        biased = self._write_bias(slot, ())
        if params.penalizes:
            self._seen[slot].zero_()
            self._seen[slot].index_fill_(0, self._sent(list(seen)), 1)
        numbers = [
            int(params.temperature > 0),
            int(biased),
            int(params.penalizes),
            params.top_k if params.top_k < self._vocab_size else 0,
            _signed(params.seed & 0xFFFFFFFF),
            _signed(params.seed >> 32),
            float_bits(params.inverse_temperature),
            float_bits(params.top_p),
            float_bits(params.min_p),
            float_bits(params.repetition_penalty),
            float_bits(params.presence_penalty),
            float_bits(params.frequency_penalty),
        ]
        numbers += [0] * (FIELDS - len(numbers))
        self._table[slot].copy_(self._sent(numbers, torch.int32))

    def ban(self, slot: int, tokens: Sequence[int]) -> None:
        """See ``Sampler``."""
        self._table[slot, BIASED.value].fill_(int(self._write_bias(slot, tokens)))

    def _write_bias(self, slot: int, banned: Sequence[int]) -> bool:
        """Writes the values that are added to a slot's logits; -infinity for tokens that are never
        drawn. Returns whether the slot has any."""
        params, row = self._params[slot], self._bias[slot]
        if not (params.logit_bias or params.allowed_token_ids or banned):
            return False
        row.fill_(-torch.inf if params.allowed_token_ids else 0.0)
        row.index_fill_(0, self._sent(list(params.allowed_token_ids)), 0.0)
        values = self._sent(list(params.logit_bias.values()), torch.float32)
        row.index_add_(0, self._sent(list(params.logit_bias)), values)
        row.index_fill_(0, self._sent(banned), -torch.inf)
        return True

    def count(self, slot: int, tokens: Sequence[int], times: int) -> None:
        """See ``Sampler``."""
        if tokens and slot in self._params and self._params[slot].penalizes:
            drawn = self._sent(list(tokens))
            counts = torch.full_like(drawn, 2 * times, dtype=torch.int32)
            self._seen[slot].index_add_(0, drawn, counts)

    def close(self, slot: int) -> None:
        """See ``Sampler``."""
        self._table[slot].zero_()
        self._params.pop(slot, None)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """See ``Sampler``. Scratch memory is allocated here: during a capture it comes from the
        graph's pool, which graphs share."""
        rows, vocab_size = logits.shape
        splits = min(MOST_SPLITS, triton.next_power_of_2(triton.cdiv(vocab_size, 4 * BLOCK)))
        processed = torch.empty_like(logits)
        listed = logits.new_empty((rows, vocab_size), dtype=torch.int32)
        lengths = slots.new_empty(rows, dtype=torch.int32)
        counts = slots.new_empty((rows, BINS.value), dtype=torch.int32)
        masses = slots.new_empty((rows, BINS.value))
        tops, bests = slots.new_empty((rows, splits)), slots.new_empty((rows, splits))
        bottoms = slots.new_empty((rows, splits), dtype=torch.int32)
        tokens = slots.new_empty(rows)
        options = {"SPLITS": splits, "BLOCK": BLOCK, **pdl_options()}
        process_logits[rows, splits](
            logits,
            slots,
            self._table,
            self._bias,
            self._seen,
            processed,
            tops,
            bottoms,
            counts,
            masses,
            lengths,
            vocab_size,
            **options,
        )
        row = (logits, processed, slots, self._table, tops, bottoms, counts, masses, lengths)
        count_bins[rows, splits](*row, vocab_size, **options)
        race[rows, splits](*row, listed, positions, bests, vocab_size, **options)
        finish[rows,](
            *row,
            listed,
            positions,
            bests,
            self._seen,
            self.drawn,
            tokens,
            vocab_size,
            **options,
        )
        return tokens

    def _sent(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return on_device(values, dtype, self._device)


def _signed(bits: int) -> int:
    return bits - (bits >> 31 << 32)
