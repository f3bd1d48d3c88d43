"""Which experts the tokens of a step run on, as kernels read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 16
"""Bytes that a set's address is a multiple of."""


@dataclass(frozen=True, kw_only=True)
class ExpertTable:
    """The sets of a step's tokens, in one layer.

    Args:
        addresses: [N] int64, where each token's neuron numbers lie, int32 each. Where a step runs
            zeroed, F bytes follow them, see ``IndexSets``.
        counts: [N] int64, how many they are; at most F.
        shared: all tokens have the set of the first.
    """

    addresses: Tensor
    counts: Tensor
    shared: bool


class IndexSets:
    """Expert sets in device memory, each as a kernel wants it: the numbers of its K neurons, int32,
    and right after them F bytes, 1 for a neuron of the set and 0 for every other. So an address and
    a count lead to both.

    Args:
        experts: [N, K] int32, each row ascending, on the device.
        ff_width: F.
    """

    def __init__(self, experts: Tensor, ff_width: int) -> None:
        sets, self.count = experts.shape
        stride = set_bytes(self.count, ff_width)
        memory = torch.empty((sets, stride), dtype=torch.uint8, device=experts.device)
        numbers = self.count * torch.int32.itemsize
        self.indices = memory[:, :numbers].view(torch.int32)
        """[N, K]."""
        self.keep = memory[:, numbers : numbers + ff_width]
        """[N, F] uint8."""
        begin = memory.data_ptr()
        self.addresses = [begin + row * stride for row in range(sets)]
        self.write(experts)

    def write(self, experts: Tensor) -> None:
        """Other experts, as many, in the order of the device's work: what was launched before still
        reads the old ones."""
        self.indices.copy_(experts)
        self.keep.zero_()
        self.keep.scatter_(1, experts.long(), 1)


def set_bytes(k: int, ff_width: int) -> int:
    """Bytes of one of ``IndexSets``."""
    return -(-(k * torch.int32.itemsize + ff_width) // _ALIGNED) * _ALIGNED


def room_for_splits(z: Tensor, width: int, kernel: Any) -> Tensor:
    """Room for the sums of all splits of a kernel, [N, n, D] float32, however many are chosen."""
    most = max(config.kwargs["SPLITS"] for config in kernel.configs)
    return torch.empty((z.shape[0], most, width), dtype=torch.float32, device=z.device)
