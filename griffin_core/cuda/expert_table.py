"""Which experts the tokens of a step run on, as kernels read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertTable:
    """The sets of a step's tokens, in one layer.

    Args:
        addresses: [N] int64, where each token's neuron numbers lie, int32 each.
        counts: [N] int64, how many they are; at most F.
        shared: all tokens have the set of the first.
    """

    addresses: Tensor
    counts: Tensor
    shared: bool


def room_for_splits(z: Tensor, width: int, kernel: Any) -> Tensor:
    """Room for the sums of all splits of a kernel, [N, n, D] float32, however many are chosen."""
    most = max(config.kwargs["SPLITS"] for config in kernel.configs)
    return torch.empty((z.shape[0], most, width), dtype=torch.float32, device=z.device)
