"""What a slim view is to the rooms that use one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    copies: bool
    """Whether a block costs memory and time to build, as copies of weights do. Sessions then run
    on all weights, zeroed (``slim.zeroed``), until theirs is built and whenever it would not pay.
    Otherwise blocks are a few numbers, there at once, and a step decides how it runs them."""

    def build(self, layer: Layer, experts: Tensor, rows: Rows) -> SlimFF:
        """The layer's FF block on ``experts`` [K], ascending int32 on any device. All neurons give
        the layer's own dense block.

        Args:
            rows: how many it will mostly be given at once.
        """
        ...

    def build_all(self, layers: Sequence[Layer], experts: Tensor) -> list[SlimFF] | None:
        """The blocks of all layers on ``experts`` [L, K], if that takes no time; None where they
        must be built one by one."""
        ...

    def rewrite(self, blocks: Sequence[SlimFF], experts: Tensor) -> bool:
        """Lets blocks of ``build_all`` run on other experts [L, K] from the next step on, in place.
        False where blocks cannot change and must be built anew."""
        ...

    def planned_bytes(self, layer: Layer, k: int) -> int:
        """Most bytes that ``build`` holds beyond the model's own weights for K = k: known before
        any expert is chosen."""
        ...
