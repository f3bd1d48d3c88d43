"""Sampling in plain torch and numpy, row by row in float64: the reference for the compiled
samplers.

A draw is a race of exponential variables: token i has the key -log(1 - v_i) / w_i, with v_i uniform
in (0, 1) by Philox of (seed, position, token), and the smallest key wins, which happens with
probability w_i / Σ w. The compiled samplers use the same random bits, so they draw the same tokens,
except for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from griffin_core.sampling.params import SamplingParams

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


@dataclass
class _Slot:
    """The sampling state of one session.

    Args:
        seen: tokens of the prompt and of earlier turns.
        drawn: how often each token has been drawn since then.
        banned: tokens that must not be drawn.
    """

    params: SamplingParams
    seen: frozenset[int]
    drawn: dict[int, int] = field(default_factory=dict)
    banned: tuple[int, ...] = ()


class TorchSlots:
    """See ``base.SamplerSlots``.

    Args:
        slots: number of sessions; one more slot is for padding and greedy.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.drawn = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._slots: dict[int, _Slot] = {}

    @property
    def nbytes(self) -> int:
        return self.drawn.nbytes

    @property
    def in_use(self) -> frozenset[int]:
        return frozenset(self._slots)

    def open(self, slot: int, params: SamplingParams, seen: Sequence[int]) -> None:
        self._slots[slot] = _Slot(params, frozenset(seen))

    def ban(self, slot: int, tokens: Sequence[int]) -> None:
        self._slots[slot].banned = tuple(tokens)

    def count(self, slot: int, tokens: Sequence[int], times: int) -> None:
        if (own := self._slots.get(slot)) is not None:
            for token in tokens:
                own.drawn[token] = own.drawn.get(token, 0) + times
                if not own.drawn[token]:
                    del own.drawn[token]

    def close(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        rows = zip(logits.cpu(), slots.tolist(), positions.tolist(), strict=True)
        tokens = [self._sample_row(row, slot, position) for row, slot, position in rows]
        drawn = torch.tensor(tokens, dtype=torch.int64, device=self.drawn.device)
        self.drawn[slots] = drawn
        return drawn

    def _sample_row(self, logits: Tensor, slot: int, position: int) -> int:
        if not logits.isfinite().all():
            return -1
        own = self._slots.get(slot)
        if own is None:
            return int(logits.argmax())
        x = _process_logits(logits.double(), own)
        token = int(x.argmax())
        if own.params.temperature > 0:
            token = _race(_weights(x, own.params), own.params.seed, position)
        own.drawn[token] = own.drawn.get(token, 0) + 1
        return token


def _process_logits(x: Tensor, own: _Slot) -> Tensor:
    """Applies biases and penalties to logits [V]; tokens that must not be drawn become
    -infinity."""
    params = own.params
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if params.penalizes:
        for token in own.seen | own.drawn.keys():
            penalty = params.repetition_penalty
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
        for token, times in own.drawn.items():
            x[token] -= params.presence_penalty + params.frequency_penalty * times
    if params.allowed_token_ids:
        allowed = torch.tensor(sorted(params.allowed_token_ids))
        x = torch.full_like(x, -torch.inf).scatter(0, allowed, x[allowed])
    x[list(own.banned)] = -torch.inf
    return x


def _weights(x: Tensor, params: SamplingParams) -> Tensor:
    """Returns the weights [V] of the tokens that top_k, top_p and min_p leave; the most likely
    token's weight is 1."""
    ranked, order = x.sort(descending=True, stable=True)
    # Subtract before dividing: x / 1e-320 is infinite, 0 / 1e-320 is not.
    w = ((ranked - ranked[0]) / params.temperature).exp()
    if params.top_k:
        w[params.top_k :] = 0
    if params.top_p < 1:
        before = w.cumsum(dim=0) - w
        before[0] = 0
        w[before >= params.top_p * w.sum()] = 0
    w[w < params.min_p] = 0
    return torch.zeros_like(w).scatter_(0, order, w)


def _race(w: Tensor, seed: int, position: int) -> int:
    v = torch.from_numpy(_uniform(len(w), seed, position))
    keys = -torch.log1p(-v) / w
    return int(torch.where(w > 0, keys, torch.inf).argmin())


def _uniform(count: int, seed: int, position: int) -> NDArray[np.float64]:
    """Returns numbers in (0, 1), four from each counter (n, position, 0) of Philox4x32-10."""
    c0 = np.arange(-(-count // 4), dtype=np.uint64)
    c1 = np.full_like(c0, position & 0xFFFFFFFF)
    c2 = np.full_like(c0, position >> 32)
    c3 = np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for i in range(_ROUNDS):
        own0 = np.uint64(k0 + _W0 * i & 0xFFFFFFFF)
        own1 = np.uint64(k1 + _W1 * i & 0xFFFFFFFF)
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1 = (p1 >> _HALF) ^ c1 ^ own0, p1 & _LOW
        c2, c3 = (p0 >> _HALF) ^ c3 ^ own1, p0 & _LOW
    bits = np.stack([c0, c1, c2, c3], axis=1).reshape(-1)[:count]
    unit = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    below_one: NDArray[np.float64] = np.minimum(unit, np.float32(1 - 2.0**-24)).astype(np.float64)
    return below_one
