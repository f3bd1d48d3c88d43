"""Keys and values of one session."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin_core.model.spec import ModelSpec


def kv_bytes(spec: ModelSpec, dtype: torch.dtype, tokens: int) -> int:
    """Bytes a cache for that many tokens takes."""
    return len(spec.layers) * 2 * spec.kv_heads * spec.head_dim * tokens * dtype.itemsize


class KvCache:
    """Room for ``capacity`` tokens in every layer, taken at once, filled from the front.

    A layer is written as its tokens pass through it, so within a step layers differ in how far
    they are filled; ``length`` is how many tokens every layer holds and moves with ``advance``.

    Args:
        capacity: most tokens.
    """

    def __init__(
        self, spec: ModelSpec, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._spec = spec
        shape = (len(spec.layers), 2, spec.kv_heads, capacity, spec.head_dim)
        self._data = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self._data.shape[3]

    @property
    def nbytes(self) -> int:
        return self._data.numel() * self._data.element_size()

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts k, v [T, kv_heads, head_dim] at positions start..start+T and returns the layer's
        keys and values up to there, each [kv_heads, start + T, head_dim], without a copy."""
        end = start + k.shape[0]
        if not 0 <= start <= end <= self.capacity:
            raise ValueError(f"tokens {start}..{end} do not fit a cache of {self.capacity}")
        keys, values = self._data[layer]
        keys[:, start:end] = k.transpose(0, 1)
        values[:, start:end] = v.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def read(self, layer: int, start: int, end: int) -> Tensor:
        """A view [2, kv_heads, end - start, head_dim] of keys and values."""
        return self._data[layer, :, :, start:end]

    def advance(self, tokens: int) -> None:
        """Says that every layer now holds that many tokens more."""
        self.length += tokens

    def grow(self, capacity: int) -> None:
        """Makes room for ``capacity`` tokens in all, by a copy; never shrinks."""
        if capacity <= self.capacity:
            return
        old = self._data
        shape = (*old.shape[:3], capacity, old.shape[4])
        self._data = torch.empty(shape, dtype=old.dtype, device=old.device)
        self._data[:, :, :, : self.length] = old[:, :, :, : self.length]
