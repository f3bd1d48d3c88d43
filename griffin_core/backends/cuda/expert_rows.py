"""The expert sets of a step's rows in one layer, in the form that kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CorrectionRows:
    """The corrections of all sets in one layer: b + (x Aᵀ) B, zero where a set has none.

    Args:
        bias: [S, D], b of slim id i in row i.
        into: [S, R, D], A; R may be 0.
        out: [S, R, D], B.
    """

    bias: Tensor
    into: Tensor
    out: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.into.shape[1]


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """The expert sets of a step's N rows in one layer.

    Args:
        indices: [S, F] int32: row i begins with the neurons of slim id i, ascending.
        keep: [S, F] uint8: 1 for each neuron of the set of slim id i, else 0.
        slim_ids: [N] int64, the slim id of each row.
        counts: [N] int64, the number of neurons in the set of each row; at most F.
        shared: whether all rows have the slim id of the first.
        correction: what is added to the output of the experts; None for nothing.
    """

    indices: Tensor
    keep: Tensor
    slim_ids: Tensor
    counts: Tensor
    shared: bool
    correction: CorrectionRows | None = None

    @property
    def rank(self) -> int:
        """R of the correction; 0 without one."""
        return 0 if self.correction is None else self.correction.rank


def room_for_splits(z: Tensor, width: int, kernel: Any) -> Tensor:
    """Allocates the sums of all splits of a kernel, [N, n, D] float32, for the largest n that
    autotuning may choose."""
    most = max(config.kwargs["SPLITS"] for config in kernel.configs)
    return torch.empty((z.shape[0], most, width), dtype=torch.float32, device=z.device)
