"""One layer's experts: ascending neuron indices, and how they are checked and serialized."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def check_experts(experts: Tensor, intermediate_size: int, what: str) -> None:
    """Raises ValueError unless ``experts`` is [..., K] int32, ascending, in [0, F).

    Args:
        what: its name in the error.
    """
    check_form(experts, intermediate_size, what)
    ascending = (experts[..., 1:] > experts[..., :-1]).all()
    inside = (experts[..., 0] >= 0).all() & (experts[..., -1] < intermediate_size).all()
    if not (ascending & inside):
        raise ValueError(
            f"{what}: indices must be ascending, distinct and in [0, {intermediate_size})"
        )


def check_form(experts: Tensor, intermediate_size: int, what: str) -> None:
    """Does the part of ``check_experts`` that reads no values, so that it never waits for a
    device."""
    k = experts.shape[-1] if experts.ndim else 0
    if experts.dtype != torch.int32 or not 0 < k <= intermediate_size or not experts.numel():
        raise ValueError(
            f"{what}: got {experts.dtype} {tuple(experts.shape)}; "
            f"allowed: int32 [..., K] with 1 <= K <= {intermediate_size}"
        )


def pack_indices(experts: Tensor) -> bytes:
    """Serializes experts [..., K] as little-endian int32, in order."""
    return experts.cpu().numpy().astype("<i4", copy=False).tobytes()


def unpack_indices(data: bytes, intermediate_size: int, what: str) -> Tensor:
    """Parses the experts of one layer, as ``pack_indices`` serializes them: -> [K] int32.

    Args:
        what: its name in the error.

    Raises:
        ValueError: the bytes are not an expert set of a layer of ``intermediate_size`` neurons.
    """
    if len(data) % 4:
        raise ValueError(f"{what}: got {len(data)} bytes; allowed: int32 values, 4 bytes each")
    experts = torch.from_numpy(np.frombuffer(data, dtype="<i4").astype(np.int32))
    check_experts(experts, intermediate_size, what)
    return experts
