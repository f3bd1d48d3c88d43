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
