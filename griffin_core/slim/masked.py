"""The reference: the dense FF with all but the experts' activations set to zero. Saves nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin_core.model.feedforward import FeedForward
from griffin_core.slim.base import SlimFF


class Masked:
    """Builds ``MaskedFF``."""

    def build(self, ff: FeedForward, experts: Tensor) -> SlimFF:
        mask = torch.zeros(ff.neurons, dtype=ff.up.dtype, device=ff.up.device)
        mask[experts.long().to(mask.device)] = 1
        return MaskedFF(ff, mask)

    def planned_bytes(self, ff: FeedForward, k: int) -> int:
        return ff.neurons * ff.up.element_size()


class MaskedFF:
    """mask [F], 1 for experts."""

    def __init__(self, ff: FeedForward, mask: Tensor) -> None:
        self._ff = ff
        self._mask = mask

    @property
    def nbytes(self) -> int:
        return self._mask.numel() * self._mask.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        return self._ff.output(self._ff.activations(x) * self._mask)
