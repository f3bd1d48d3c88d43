"""What a slim view is to everybody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from griffin_core.model.decoder import Layer
from griffin_core.model.linear import Rows

SlimFF = Callable[[Tensor], Tensor]
"""One layer's FF on one expert set: [T, D] -> [T, D]."""


class SlimForm(Protocol):
    """A way of running FF blocks on experts: copies them, masks the others, reads by index, ...

    One object serves all sessions and layers and holds no state of any.
    """

    def build(self, layer: Layer, experts: Tensor, rows: Rows) -> SlimFF:
        """The layer's FF block on ``experts`` [K], ascending int32 on any device. All neurons give
        the layer's own dense block.

        Args:
            rows: how many it will mostly be given at once.
        """
        ...

    def planned_bytes(self, layer: Layer, k: int) -> int:
        """Most bytes that ``build`` holds beyond the model's own weights for K = k: known before
        any expert is chosen."""
        ...
