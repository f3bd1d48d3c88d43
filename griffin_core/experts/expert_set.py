"""A request's experts: one ascending set of neuron indices for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertSet:
    """The experts of all layers.

    Args:
        ff_width: F.
        layers: for each layer its experts [K], ascending int32.

    Raises:
        ValueError: indices are not ascending, not distinct or not in [0, F).
    """

    ff_width: int
    layers: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        for index, experts in enumerate(self.layers):
            check_experts(experts, self.ff_width, layer=index)

    @property
    def density(self) -> float:
        """Fraction of all neurons that are in the set."""
        kept = sum(experts.numel() for experts in self.layers)
        return kept / (self.ff_width * len(self.layers))

    def digest(self) -> bytes:
        """16 bytes that equal sets share and different ones do not."""
        digest = blake2b(digest_size=16)
        for experts in self.layers:
            digest.update(experts.numel().to_bytes(4, "little") + pack_indices(experts))
        return digest.digest()

    def norm_mass(self, s2: Tensor) -> tuple[float, ...]:
        """For each layer the share of its statistic s2 [L, F] that its experts hold, in [0, 1]; 1
        if nothing fired at all."""
        kept = torch.stack(
            [row[experts.long()].sum() for row, experts in zip(s2, self.layers, strict=True)]
        )
        total = s2.sum(dim=1)
        return tuple(torch.where(total > 0, kept / total, torch.ones_like(total)).tolist())

    def jaccard(self, other: ExpertSet) -> list[float]:
        """|A ∩ B| / |A ∪ B| for each layer.

        Raises:
            ValueError: the two are of different models.
        """
        if (self.ff_width, len(self.layers)) != (other.ff_width, len(other.layers)):
            raise ValueError(
                f"expert sets of different shape: F = {self.ff_width} and {other.ff_width}, "
                f"L = {len(self.layers)} and {len(other.layers)}"
            )
        overlaps = []
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            both = torch.isin(mine, theirs).sum().item()
            overlaps.append(both / (mine.numel() + theirs.numel() - both))
        return overlaps


def check_experts(experts: Tensor, ff_width: int, *, layer: int) -> None:
    """Raises ValueError unless ``experts`` is one layer's set: [K] int32, ascending, in [0, F)."""
    if experts.dtype != torch.int32 or experts.ndim != 1 or not 0 < experts.numel() <= ff_width:
        raise ValueError(
            f"experts of layer {layer}: got {experts.dtype} {tuple(experts.shape)}; "
            f"allowed: int32 [K] with 1 <= K <= {ff_width}"
        )
    ascending = bool((experts[1:] > experts[:-1]).all())
    if not ascending or experts[0] < 0 or experts[-1] >= ff_width:
        raise ValueError(
            f"experts of layer {layer}: indices must be ascending, distinct and in [0, {ff_width})"
        )


def pack_indices(experts: Tensor) -> bytes:
    """Experts [K] -> K little-endian int32."""
    return experts.cpu().numpy().astype("<i4", copy=False).tobytes()


def unpack_indices(data: bytes, ff_width: int, *, layer: int) -> Tensor:
    """The inverse of ``pack_indices``.

    Raises:
        ValueError: the bytes are no expert set of a layer of ``ff_width`` neurons.
    """
    if len(data) % 4:
        raise ValueError(f"experts of layer {layer}: {len(data)} bytes are no run of int32")
    experts = torch.from_numpy(np.frombuffer(data, dtype="<i4").astype(np.int32))
    check_experts(experts, ff_width, layer=layer)
    return experts
