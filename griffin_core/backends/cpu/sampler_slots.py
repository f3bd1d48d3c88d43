"""What is kept for each sampler slot on a CPU: see ``backends.base.SamplerSlots``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from griffin_core.backends.cpu.race import BLOCK
from griffin_core.backends.cpu.sampling import (
    BAN_TOKENS,
    BANS,
    BIAS_TOKENS,
    BIAS_VALUES,
    BIASES,
    BINS,
    FIELDS,
    FREQUENCY,
    INVERSE_TEMPERATURE,
    MIN_P,
    PRESENCE,
    REPETITION,
    SAMPLES,
    SEED,
    SEEN,
    TOP_K,
    TOP_P,
    sample_rows,
)
from griffin_core.backends.cpu.team import address
from griffin_core.backends.transfers import float_bits

if TYPE_CHECKING:
    from griffin_core.sampling.params import SamplingParams


class CpuSlots:
    """The sampling state of each slot, in a table of numbers and addresses. See ``Sampler``.

    Args:
        slots: S, the number of sessions; slot S always exists and is greedy.
        vocab_size: V.
    """

    def __init__(self, *, slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.drawn = torch.zeros(slots + 1, dtype=torch.int64)
        self._table = torch.zeros((slots + 1, FIELDS), dtype=torch.int64)
        self._owned: list[tuple[Tensor, ...]] = [()] * (slots + 1)
        """For each slot the tensors that the table points to."""
        self._seen: dict[int, Tensor] = {}
        """Those of them that count tokens, of slots with penalties."""
        self._others: dict[int, Tensor] = {}
        """For each slot whose request allows only certain tokens: [V] bool, True for all other
        tokens."""
        self._banned: dict[int, Tensor] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """See ``Sampler``."""
        own = sum(tensor.nbytes for tensors in self._owned for tensor in tensors)
        own += sum(t.nbytes for slots in (self._others, self._banned) for t in slots.values())
        return own + self._table.nbytes + self.drawn.nbytes

    @property
    def in_use(self) -> frozenset[int]:
        """See ``Sampler``."""
        rows = self._table.any(dim=1).nonzero()[:, 0].tolist()
        owned = (slot for slot, tensors in enumerate(self._owned) if tensors)
        return frozenset((*rows, *owned, *self._others, *self._banned))

    def open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None:
        """See ``Sampler``."""
        self.close(slot)
        if not params.plain:  # a row of zeros means plain
            self._open(slot, params, seen)
        if params.allowed_token_ids:
            others = torch.ones(self._vocab_size, dtype=torch.bool)
            others[list(params.allowed_token_ids)] = False
            self._others[slot] = others
            self.ban(slot, ())

    def _open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None:
        tokens = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        counts = None
        if params.penalizes:
            counts = torch.zeros(self._vocab_size, dtype=torch.int32)
            counts[torch.tensor(list(seen), dtype=torch.int64)] = 1
            self._seen[slot] = counts
        self._owned[slot] = (tokens, values) if counts is None else (tokens, values, counts)
        row = {
            SAMPLES: int(params.temperature > 0),
            TOP_K: params.top_k if params.top_k < self._vocab_size else 0,
            SEED: params.seed - (params.seed >> 63 << 64),  # the same bits as a signed int64
            BIASES: len(tokens),
            BIAS_TOKENS: address(tokens),
            BIAS_VALUES: address(values),
            SEEN: address(counts),
            INVERSE_TEMPERATURE: float_bits(params.inverse_temperature),
            TOP_P: float_bits(params.top_p),
            MIN_P: float_bits(params.min_p),
            REPETITION: float_bits(params.repetition_penalty),
            PRESENCE: float_bits(params.presence_penalty),
            FREQUENCY: float_bits(params.frequency_penalty),
            BANS: 0,
            BAN_TOKENS: 0,
        }
        self._table[slot] = torch.tensor([row[field] for field in range(FIELDS)])

    def ban(self, slot: int, tokens: Sequence[int]) -> None:
        """See ``Sampler``."""
        banned = torch.tensor(tokens, dtype=torch.int64)
        if slot in self._others:
            others = self._others[slot].clone()
            others[banned] = True
            banned = others.nonzero()[:, 0]
        self._banned[slot] = banned
        self._table[slot, BANS] = len(banned)
        self._table[slot, BAN_TOKENS] = address(banned)

    def count(self, slot: int, tokens: Sequence[int], times: int) -> None:
        """See ``Sampler``."""
        if (counts := self._seen.get(slot)) is not None:
            drawn = torch.tensor(tokens, dtype=torch.int64)
            counts.index_add_(0, drawn, torch.full_like(drawn, 2 * times, dtype=counts.dtype))

    def close(self, slot: int) -> None:
        """See ``Sampler``."""
        self._seen.pop(slot, None)
        self._table[slot] = 0
        self._owned[slot] = ()
        self._others.pop(slot, None)
        self._banned.pop(slot, None)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """See ``Sampler``."""
        if not sample_rows.compiled and not self._table[slots].any():
            # Avoids compiling the loops in a process that only gets plain greedy requests.
            tokens = logits.argmax(dim=1).masked_fill(~logits.isfinite().all(dim=1), -1)
            self.drawn[slots] = tokens
            return tokens
        rows, vocab_size = logits.shape
        threads = max(1, min(rows, torch.get_num_threads()))
        padded = -(-vocab_size // BLOCK) * BLOCK
        # For each thread: processed logits, weights, bins and a list of tokens; the histogram; a
        # block of random numbers.
        size = 16 * padded + 8 * BINS + 4 * BLOCK
        if self._scratch.numel() < threads * size:
            self._scratch = torch.empty(threads * size, dtype=torch.uint8)
        tokens = torch.empty(rows, dtype=torch.int64)
        sample_rows(
            logits.data_ptr(),
            slots.data_ptr(),
            positions.data_ptr(),
            self._table.data_ptr(),
            tokens.data_ptr(),
            self.drawn.data_ptr(),
            self._scratch.data_ptr(),
            size,
            rows,
            vocab_size,
            threads=threads,
        )
        return tokens
