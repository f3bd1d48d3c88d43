"""What tells models apart: their spec and their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from griffin_core.spec.model import ModelSpec

FINGERPRINT_SAMPLES = 1024


def fingerprint(spec: ModelSpec, state: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits over the spec and, of every tensor, its name, shape, dtype and
    evenly spaced samples: cheap for any size, different for any two trained models."""
    digest = hashlib.sha256(repr(spec).encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.flatten()
        samples = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].contiguous().cpu()
        digest.update(samples.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
