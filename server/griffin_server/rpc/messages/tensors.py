"""Tensors as bytes in messages."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_floats(values: Tensor) -> bytes:
    """float32 [...] -> little-endian float32, in row-major order."""
    return values.cpu().numpy().astype("<f4", copy=False).tobytes()


def unpack_floats(data: bytes) -> Tensor:
    """Little-endian float32 -> float32 [n].

    Raises:
        ValueError: the length is not a multiple of four.
    """
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))


def pack_tensor(values: Tensor) -> bytes:
    """Values of any type [...] -> their bytes, in row-major order."""
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def unpack_tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    """Bytes -> values [n] of a type.

    Raises:
        ValueError: the length is not a multiple of a value's.
    """
    if len(data) % dtype.itemsize:
        raise ValueError(f"got {len(data)} bytes; allowed: a multiple of {dtype.itemsize}")
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).view(dtype)
