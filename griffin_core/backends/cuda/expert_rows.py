"""On which experts the rows of a step run, in one layer, as kernels read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """The expert sets of a step's N rows in one layer.

    Args:
        indices: [S, F] int32: row i holds the neurons of slim id i, ascending, from the left.
        keep: [S, F] uint8: 1 for a neuron of the set, else 0.
        slim_ids: [N] int64, the slim id of each row.
        counts: [N] int64, how many neurons the set of each row has; at most F.
        shared: all rows have the slim id of the first.
    """

    indices: Tensor
    keep: Tensor
    slim_ids: Tensor
    counts: Tensor
    shared: bool


def room_for_splits(z: Tensor, width: int, kernel: Any) -> Tensor:
    """Room for the sums of all splits of a kernel, [N, n, D] float32, however many are chosen."""
    most = max(config.kwargs["SPLITS"] for config in kernel.configs)
    return torch.empty((z.shape[0], most, width), dtype=torch.float32, device=z.device)
