"""The expert sets of a step's rows in one layer, in the form that kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """The expert sets of a step's N rows in one layer.

    Args:
        indices: [S, F] int32: row i begins with the neurons of slim id i, ascending.
        keep: [S, F] uint8: 1 for each neuron of the set of slim id i, else 0.
        slim_ids: [N] int64, the slim id of each row.
        counts: [N] int64, the number of neurons in the set of each row; at most F.
        shared: whether all rows have the slim id of the first.
    """

    indices: Tensor
    keep: Tensor
    slim_ids: Tensor
    counts: Tensor
    shared: bool


def room_for_splits(z: Tensor, width: int, kernel: Any) -> Tensor:
    """Allocates the sums of all splits of a kernel, [N, n, D] float32, for the largest n that
    autotuning may choose."""
    most = max(config.kwargs["SPLITS"] for config in kernel.configs)
    return torch.empty((z.shape[0], most, width), dtype=torch.float32, device=z.device)
