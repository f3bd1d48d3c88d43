"""Copies of the experts' rows, gathered once a session: the form for CPUs."""

from __future__ import annotations

from torch import Tensor

from griffin_core.model.feedforward import FeedForward
from griffin_core.slim.base import DenseFF, SlimFF


class Packed:
    """Builds a FeedForward that has only the experts' neurons. All neurons are not copied."""

    def build(self, ff: FeedForward, experts: Tensor) -> SlimFF:
        if experts.shape[0] == ff.neurons:
            return DenseFF(ff=ff)
        return ff.take(experts.to(ff.up.device))

    def planned_bytes(self, ff: FeedForward, k: int) -> int:
        if k == ff.neurons:
            return 0
        shared = 0 if ff.down_bias is None else ff.down_bias.numel() * ff.down_bias.element_size()
        return (ff.nbytes - shared) * k // ff.neurons + shared
