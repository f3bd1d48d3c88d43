"""Small copies between the host and a device, for which the host does not wait."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def on_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Integers [N] on the device.

    The host does not wait for a GPU: a copy from pinned memory takes its place in the order of the
    device's work, where one from ordinary memory waits until all work before it is done.
    """
    return sent(torch.tensor(values, dtype=dtype), device)


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, as ``on_device`` sends integers."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """A copy in the host's memory, complete once the device has done what it was given so far; the
    host does not wait for a GPU."""
    if x.device.type != "cuda":
        return x.to("cpu", copy=True)
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


@lru_cache(maxsize=1024)
def float_bits(value: float) -> int:
    """The bits of a float32 as an int32: how a kernel is passed one among integers."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
