"""What a slim view is to everybody else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from griffin_core.model.feedforward import FeedForward


class SlimFF(Protocol):
    """One layer's FF on one expert set. Called with x [T, D], gives [T, D]."""

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the model's own weights."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...


class SlimForm(Protocol):
    """A way of running FF blocks on experts: copies them, masks the others, reads by index, ...

    One object serves all sessions and layers and holds no state of any.
    """

    def build(self, ff: FeedForward, experts: Tensor) -> SlimFF:
        """The FF block ``ff`` on ``experts`` [K], ascending int32 on any device."""
        ...

    def planned_bytes(self, ff: FeedForward, k: int) -> int:
        """What ``build`` will hold for K = k: known before any expert is chosen."""
        ...


@dataclass(frozen=True, kw_only=True)
class DenseFF:
    """All neurons: the model's own block, nothing held beside it."""

    ff: FeedForward
    nbytes: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        return self.ff(x)


@dataclass(frozen=True, kw_only=True)
class SlimView:
    """A session's FF blocks, one for each layer."""

    layers: tuple[SlimFF, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the model's own weights."""
        return sum(layer.nbytes for layer in self.layers)
