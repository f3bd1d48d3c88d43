"""A request's experts: one ascending set of neuron indices for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertSet:
    """The experts of all layers.

    Args:
        ff_width: F.
        indices: [L, K] int32, each row ascending.

    Raises:
        ValueError: the indices have another shape or type; or, if they are on the CPU, they are not
            ascending, not distinct or not in [0, F). On a GPU the values are not checked, since
            that would synchronize; received indices are checked before they are copied there
            (``unpack_indices``).
    """

    ff_width: int
    indices: Tensor

    def __post_init__(self) -> None:
        if self.indices.ndim != 2:
            raise ValueError(f"experts: got {tuple(self.indices.shape)}; allowed: [L, K]")
        if self.indices.device.type == "cpu":
            check_experts(self.indices, self.ff_width, "experts")
        else:
            _check_form(self.indices, self.ff_width, "experts")

    @cached_property
    def layers(self) -> tuple[Tensor, ...]:
        """The experts [K] of each layer."""
        return self.indices.unbind()

    @property
    def density(self) -> float:
        """The fraction of all neurons that are in the set."""
        return self.indices.shape[1] / self.ff_width

    @cached_property
    def digest(self) -> bytes:
        """A hash of 16 bytes: equal for equal sets, different for different ones."""
        shape = repr((self.ff_width, *self.indices.shape)).encode()
        return blake2b(pack_indices(self.indices), digest_size=16, key=shape).digest()

    def norm_mass(self, s2: Tensor) -> tuple[float, ...]:
        """Returns for each layer the share of its statistic s2 [L, F] that its experts hold, in [0,
        1]; 1 if the statistic is all zero."""
        kept = s2.gather(1, self.indices.to(s2.device, torch.int64)).sum(dim=1)
        total = s2.sum(dim=1)
        return tuple(torch.where(total > 0, kept / total, torch.ones_like(total)).tolist())

    def jaccard(self, other: ExpertSet) -> list[float]:
        """Returns |A ∩ B| / |A ∪ B| for each layer.

        Raises:
            ValueError: the sets belong to different models.
        """
        if (self.ff_width, len(self.layers)) != (other.ff_width, len(other.layers)):
            raise ValueError(
                f"expert sets of different shape: F = {self.ff_width} and {other.ff_width}, "
                f"L = {len(self.layers)} and {len(other.layers)}"
            )
        inside = torch.zeros((len(self.layers), self.ff_width), dtype=torch.bool)
        inside.scatter_(1, self.indices.to("cpu", torch.int64), True)
        both = inside.gather(1, other.indices.to("cpu", torch.int64)).sum(dim=1)
        either = self.indices.shape[1] + other.indices.shape[1] - both
        overlaps: list[float] = (both / either).tolist()
        return overlaps


def check_experts(experts: Tensor, ff_width: int, what: str) -> None:
    """Raises ValueError unless ``experts`` is [..., K] int32, ascending, in [0, F).

    Args:
        what: its name in the error.
    """
    _check_form(experts, ff_width, what)
    ascending = (experts[..., 1:] > experts[..., :-1]).all()
    inside = (experts[..., 0] >= 0).all() & (experts[..., -1] < ff_width).all()
    if not (ascending & inside):
        raise ValueError(f"{what}: indices must be ascending, distinct and in [0, {ff_width})")


def _check_form(experts: Tensor, ff_width: int, what: str) -> None:
    k = experts.shape[-1] if experts.ndim else 0
    if experts.dtype != torch.int32 or not 0 < k <= ff_width or not experts.numel():
        raise ValueError(
            f"{what}: got {experts.dtype} {tuple(experts.shape)}; "
            f"allowed: int32 [..., K] with 1 <= K <= {ff_width}"
        )


def pack_indices(experts: Tensor) -> bytes:
    """Serializes experts [..., K] as little-endian int32, in order."""
    return experts.cpu().numpy().astype("<i4", copy=False).tobytes()


def unpack_indices(data: bytes, ff_width: int, what: str) -> Tensor:
    """Parses the experts of one layer, as ``pack_indices`` serializes them: -> [K] int32.

    Args:
        what: its name in the error.

    Raises:
        ValueError: the bytes are not an expert set of a layer of ``ff_width`` neurons.
    """
    if len(data) % 4:
        raise ValueError(f"{what}: got {len(data)} bytes; allowed: int32 values, 4 bytes each")
    experts = torch.from_numpy(np.frombuffer(data, dtype="<i4").astype(np.int32))
    check_experts(experts, ff_width, what)
    return experts
