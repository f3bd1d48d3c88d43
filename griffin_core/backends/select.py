"""The one place that chooses a backend by device and dtype."""

from __future__ import annotations

import torch

from griffin_core.backends.base import Backend
from griffin_core.backends.torch import TorchBackend


def backend_for(device: torch.device, dtype: torch.dtype) -> Backend:
    """Returns the fastest backend for weights of a dtype on a device. Imports only that backend's
    kernels: numba's for a CPU, Triton's for an NVIDIA GPU."""
    if device.type == "cpu":
        from griffin_core.backends.cpu.backend import CpuBackend  # noqa: PLC0415  # needs numba

        return CpuBackend(device, dtype)
    if device.type == "cuda":
        from griffin_core.backends.cuda.backend import cuda_backend  # noqa: PLC0415  # needs triton

        return cuda_backend(device, dtype)
    return TorchBackend(device, dtype)
