"""Kernels for NVIDIA GPUs: decode steps as CUDA graphs that read experts by index from the resident
weights, and the statistic. Its modules are imported only where there is a GPU: triton comes with
torch's CUDA builds alone."""

from __future__ import annotations

import torch


def runs_cuda_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this kind are multiplied by the kernels of this package."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
