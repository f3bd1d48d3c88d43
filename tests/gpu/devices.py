"""What the GPU tests run on: a CUDA device, or Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED and _HAS_TRITON else "cuda" if torch.cuda.is_available() else None

needs_triton = pytest.mark.skipif(
    DEVICE is None, reason="needs a CUDA device, or triton and TRITON_INTERPRET=1"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
