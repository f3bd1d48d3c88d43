"""Kernels for NVIDIA GPUs: decode steps as CUDA graphs that read experts by index from the resident
weights, and the statistic. Its modules are imported only where there is a GPU: triton comes with
torch's CUDA builds alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def runs_cuda_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this kind are multiplied by the kernels of this package."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def on_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Integers [N] on the device. The host does not wait for a GPU: a copy from pinned memory takes
    its place in the order of the device's work, where one from ordinary memory waits until all work
    before it is done."""
    here = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return here
    return here.pin_memory().to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """A copy in the host's memory, there once the device has done what it was given so far; the
    host does not wait for a GPU."""
    if x.device.type == "cpu":
        return x.clone()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
