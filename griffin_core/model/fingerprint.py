"""The fingerprint of a model: a hash of its spec and its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from griffin_core.spec.model import ModelSpec

FINGERPRINT_SAMPLES = 1024


def fingerprint(spec: ModelSpec, state: Mapping[str, Tensor]) -> str:
    """Returns 64 hexadecimal digits: a hash of the spec and of the name, shape, dtype and evenly
    spaced samples of every tensor. It is cheap for any size, and differs between any two trained
    models."""
    digest = hashlib.sha256(repr(spec).encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.flatten()
        samples = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].contiguous().cpu()
        digest.update(samples.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
