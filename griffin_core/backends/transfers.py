"""Small copies between the host and a device that do not block the host."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copies numbers [N] to the device.

    The host does not wait for a GPU: a copy from pinned memory is queued in the stream, while a
    copy from pageable memory blocks until all earlier work is done.
    """
    return sent(torch.tensor(values, dtype=dtype), device)


def sent(host: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from the host to the device in the same way as ``on_device``."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """Copies a tensor to the host's memory. The copy is complete once the device has finished all
    work submitted so far; the host does not wait for a GPU."""
    if x.device.type != "cuda":
        return x.to("cpu", copy=True)
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


@lru_cache(maxsize=1024)
def float_bits(value: float) -> int:
    """Returns the bits of a float32 as an int32, to pass it to a kernel that takes integers."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
