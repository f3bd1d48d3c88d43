"""What a session's FF blocks run on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate

import torch
from torch import Tensor

from griffin_core.backends.transfers import on_device
from griffin_core.experts.correction import Correction
from griffin_core.experts.expert_set import check_experts, check_form, pack_indices


@dataclass(frozen=True, kw_only=True)
class SlimSpec:
    """The experts of all layers, and what stands in for the other neurons. Layers may have
    different numbers of experts.

    Args:
        intermediate_size: F.
        counts: K of each layer, each in [1, F].
        experts: [ΣK] int32, layer after layer, ascending in each layer.
        correction: what is added to the output of the experts; None for nothing.

    Raises:
        ValueError: the experts have another shape or type; or, if they are on the CPU, they are not
            ascending, not distinct or not in [0, F). On a GPU the values are not checked, since
            that would synchronize; received experts are checked before they are copied there
            (``unpack_indices``).
    """

    intermediate_size: int
    counts: tuple[int, ...]
    experts: Tensor
    correction: Correction | None = None

    def __post_init__(self) -> None:
        allowed = f"allowed: {sum(self.counts)} for {len(self.counts)} layers"
        if self.experts.shape != (sum(self.counts),) or not self.counts:
            raise ValueError(f"experts: got {tuple(self.experts.shape)}; {allowed}")
        uniform = len(set(self.counts)) == 1
        for rows in (self.table,) if uniform else self.layers:
            if self.experts.device.type == "cpu":
                check_experts(rows, self.intermediate_size, "experts")
            else:
                check_form(rows, self.intermediate_size, "experts")

    @staticmethod
    def of_layers(intermediate_size: int, layers: Iterable[Tensor]) -> SlimSpec:
        """Joins the experts [K] int32 of each layer; K may differ."""
        each = tuple(layers)
        counts = tuple(len(experts) for experts in each)
        return SlimSpec(intermediate_size=intermediate_size, counts=counts, experts=torch.cat(each))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The place in ``experts`` of each layer's first expert, and ΣK last."""
        return (0, *accumulate(self.counts))

    @cached_property
    def layers(self) -> tuple[Tensor, ...]:
        """The experts [K] of each layer."""
        return self.experts.split_with_sizes(self.counts)

    @cached_property
    def table(self) -> Tensor:
        """The experts as a rectangle, [L, max K] int32. A layer with fewer experts repeats its last
        one, so that a row is ascending and has no other neurons."""
        most = max(self.counts)
        if min(self.counts) == most:
            return self.experts.view(-1, most)
        device = self.experts.device
        starts = on_device(self.offsets[:-1], torch.int64, device)[:, None]
        last = on_device(self.counts, torch.int64, device)[:, None] - 1
        return self.experts[starts + torch.arange(most, device=device).minimum(last)]

    def to(self, device: torch.device) -> SlimSpec:
        """Returns a copy on a device."""
        correction = None if self.correction is None else self.correction.to(device)
        return replace(self, experts=self.experts.to(device), correction=correction)

    def mask(self, device: torch.device | None = None) -> Tensor:
        """Returns which neurons are experts, [L, F] bool.

        Args:
            device: where to make it; None for where the experts are.
        """
        table = self.table.to(device or self.experts.device, torch.int64)
        mask = torch.zeros(
            (len(self.counts), self.intermediate_size), dtype=torch.bool, device=table.device
        )
        return mask.scatter_(1, table, True)

    @property
    def prunes(self) -> bool:
        """Whether any neuron is left out."""
        return min(self.counts) < self.intermediate_size

    @property
    def density(self) -> float:
        """The fraction of all neurons that are experts."""
        return sum(self.counts) / (len(self.counts) * self.intermediate_size)

    @cached_property
    def digest(self) -> bytes:
        """A hash of 16 bytes: equal for equal values, different for different ones."""
        shape = blake2b(
            repr((self.intermediate_size, self.counts)).encode(), digest_size=32
        ).digest()
        digest = blake2b(pack_indices(self.experts), digest_size=16, key=shape)
        if self.correction is not None:
            digest.update(self.correction.digest)
        return digest.digest()

    def norm_mass(self, s2: Tensor) -> tuple[float, ...]:
        """Returns for each layer the share of its statistic s2 [L, F] that its experts hold, in [0,
        1]; 1 if the statistic is all zero."""
        shares: list[float] = self.norm_mass_on_device(s2).tolist()
        return tuple(shares)

    def norm_mass_on_device(self, s2: Tensor) -> Tensor:
        """Returns the same as a tensor [L], without waiting for the device of ``s2``."""
        total = s2.sum(dim=1)
        if not self.prunes:
            return torch.ones_like(total)
        kept = torch.where(self.mask(s2.device), s2, 0.0).sum(dim=1)
        return torch.where(total > 0, kept / total, 1.0)

    def jaccard(self, other: SlimSpec) -> list[float]:
        """Returns |A ∩ B| / |A ∪ B| of the experts of each layer.

        Raises:
            ValueError: the two belong to different models.
        """
        mine = len(self.counts), self.intermediate_size
        theirs = len(other.counts), other.intermediate_size
        if mine != theirs:
            raise ValueError(f"expert sets of different shape: [L, F] = {mine} and {theirs}")
        host = torch.device("cpu")
        one, two = self.mask(host), other.mask(host)
        overlaps: list[float] = ((one & two).sum(dim=1) / (one | two).sum(dim=1)).tolist()
        return overlaps
