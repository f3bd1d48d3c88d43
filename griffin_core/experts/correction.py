"""What stands in for the neurons that are not experts: an estimate of their output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import torch
from torch import Tensor

from griffin_core.errors import InvalidRequest
from griffin_core.spec.choices import CORRECTION_KINDS, DEFAULT_RANK, MAX_RANK, CorrectionKind


@dataclass(frozen=True, kw_only=True)
class CorrectionParams:
    """What is added to the output of the experts.

    Args:
        kind: see ``choices.CorrectionKind``.
        rank: r of a residual, in [1, ``MAX_RANK``]; 0 for other kinds.

    Raises:
        InvalidRequest: there is no such kind, or the rank is out of range.
    """

    kind: CorrectionKind = "none"
    rank: int = 0

    def __post_init__(self) -> None:
        if self.kind not in CORRECTION_KINDS:
            raise InvalidRequest("pruning.correction", self.kind, ", ".join(CORRECTION_KINDS))
        if self.kind == "residual" and not 1 <= self.rank <= MAX_RANK:
            raise InvalidRequest("pruning.correction_rank", self.rank, f"[1, {MAX_RANK}]")
        if self.kind != "residual" and self.rank:
            given = f"{self.rank} with {self.kind}"
            raise InvalidRequest("pruning.correction_rank", given, "a rank with residual only")

    def nbytes(self, layers: int, hidden_size: int, itemsize: int) -> int:
        """Returns the most bytes that a session's correction takes: (1 + 2r) · L · D values."""
        vectors = 0 if self.kind == "none" else 1 + 2 * self.rank
        return vectors * layers * hidden_size * itemsize


NO_CORRECTION = CorrectionParams()


def correction_params(
    base: CorrectionParams,
    kind: CorrectionKind | None,
    rank: int | None,
    *,
    default_rank: int = DEFAULT_RANK,
) -> CorrectionParams:
    """Returns what a request asks for.

    Args:
        base: for what the request does not set.
        default_rank: of a residual where neither says one.
        kind, rank: what it sets.

    Raises:
        InvalidRequest: a rank without a residual, or a value is out of range.
    """
    kind = kind or base.kind
    if rank is None:
        rank = (base.rank or default_rank) if kind == "residual" else 0
    elif kind == "residual" and rank == 0:
        raise InvalidRequest("pruning.correction_rank", 0, f"[1, {MAX_RANK}]")
    return CorrectionParams(kind=kind, rank=rank)


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What is added to the FF's output of every layer: b + (x Aᵀ) B for its input x [T, D]. All
    tensors have the dtype of the model.

    Args:
        bias: [L, D], b.
        into: [L, r, D], A; None for a bias alone.
        out: [L, r, D], B; None for a bias alone.

    Raises:
        ValueError: the shapes do not fit together.
    """

    bias: Tensor
    into: Tensor | None = None
    out: Tensor | None = None

    def __post_init__(self) -> None:
        into, out = self.into, self.out
        layers, width = self.bias.shape
        if (into is None) != (out is None):
            raise ValueError("correction: one of A and B without the other")
        if into is not None and out is not None:
            allowed = (layers, into.shape[1], width)
            if into.shape != allowed or out.shape != allowed or not into.shape[1]:
                raise ValueError(
                    f"correction: got A {tuple(into.shape)} and B {tuple(out.shape)}; allowed: "
                    f"[{layers}, r, {width}]"
                )

    @property
    def rank(self) -> int:
        """r; 0 for a bias alone."""
        return 0 if self.into is None else self.into.shape[1]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors)

    @property
    def is_finite(self) -> bool:
        """Whether it holds no NaN and no infinite value. Waits for the device."""
        return all(bool(each.isfinite().all()) for each in self._tensors)

    @property
    def _tensors(self) -> list[Tensor]:
        return [each for each in (self.bias, self.into, self.out) if each is not None]

    def layer(self, index: int) -> LayerCorrection:
        """Returns what belongs to one layer."""
        return LayerCorrection(
            bias=self.bias[index],
            into=None if self.into is None else self.into[index],
            out=None if self.out is None else self.out[index],
        )

    @staticmethod
    def of_layers(layers: Sequence[LayerCorrection]) -> Correction:
        """Joins the corrections of all layers, which have the same rank.

        Raises:
            ValueError: they have not.
        """
        if len({each.rank for each in layers}) != 1:
            raise ValueError("correction: layers of different rank")
        into = [each.into for each in layers if each.into is not None]
        out = [each.out for each in layers if each.out is not None]
        return Correction(
            bias=torch.stack([each.bias for each in layers]),
            into=torch.stack(into) if into else None,
            out=torch.stack(out) if out else None,
        )

    def to(self, device: torch.device) -> Correction:
        """Returns a copy on a device."""
        return Correction(
            bias=self.bias.to(device),
            into=None if self.into is None else self.into.to(device),
            out=None if self.out is None else self.out.to(device),
        )

    @cached_property
    def digest(self) -> bytes:
        """A hash of 16 bytes: equal for equal values."""
        digest = blake2b(repr([tuple(each.shape) for each in self._tensors]).encode())
        for each in self._tensors:
            digest.update(each.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.digest()[:16]


@dataclass(frozen=True, kw_only=True)
class LayerCorrection:
    """The correction of one layer.

    Args:
        bias: [D].
        into: [r, D] or None.
        out: [r, D] or None.
    """

    bias: Tensor
    into: Tensor | None = None
    out: Tensor | None = None

    @property
    def rank(self) -> int:
        """r; 0 for a bias alone."""
        return 0 if self.into is None else self.into.shape[0]

    def equals(self, other: LayerCorrection) -> bool:
        """Returns whether all values are the same."""
        pairs = ((self.bias, other.bias), (self.into, other.into), (self.out, other.out))
        return all(
            mine is theirs
            or (mine is not None and theirs is not None and torch.equal(mine, theirs))
            for mine, theirs in pairs
        )

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds b + (x Aᵀ) B to y [T, D] in place, and returns it.

        Args:
            x: [T, D], the normalized input of the FF.
        """
        return self.add_map(y, x).add_(self.bias)

    def add_map(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds (x Aᵀ) B alone to y [T, D] in place, and returns it."""
        if self.into is not None and self.out is not None:
            y.addmm_(x @ self.into.t(), self.out)
        return y
