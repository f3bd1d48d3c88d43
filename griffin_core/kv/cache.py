"""Keys and values of one session."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin_core.spec.model import ModelSpec


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
        shape = (2, spec.kv_heads, capacity, spec.head_dim)
        self._layers = [torch.empty(shape, dtype=dtype, device=device) for _ in spec.layers]
        self._addresses: list[int] | None = None
        self.capacity = capacity
        self.length = 0

    @property
    def addresses(self) -> list[int]:
        """Where each layer [2, kv_heads, capacity, head_dim] lies."""
        if self._addresses is None:
            self._addresses = [layer.data_ptr() for layer in self._layers]
        return self._addresses

    @property
    def nbytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self._layers)

    def write(self, layer: int, start: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Puts keys and values at positions start..start+T.

        Args:
            kv: [T, 2 · kv_heads, head_dim], the heads of the keys, then those of the values.

        Returns:
            The layer's keys and values up to there, each [kv_heads, start + T, head_dim], without
            a copy.
        """
        tokens, _, head_dim = kv.shape
        end = start + tokens
        self.room(layer, start, end).copy_(kv.view(tokens, 2, -1, head_dim).permute(1, 2, 0, 3))
        keys, values = self._layers[layer][:, :, :end].unbind()
        return keys, values

    def room(self, layer: int, start: int, end: int) -> Tensor:
        """A view [2, kv_heads, end - start, head_dim] of keys and values, to read or to fill."""
        if not 0 <= start <= end <= self.capacity:
            raise ValueError(f"tokens {start}..{end} do not fit a cache of {self.capacity}")
        return self._layers[layer][:, :, start:end]

    def advance(self, tokens: int) -> None:
        """Says that every layer now holds that many tokens more."""
        self.length += tokens

    def rewind(self, length: int) -> None:
        """Forgets what is after the first ``length`` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind {self.length} tokens to {length}")
        self.length = length

    def resize(self, capacity: int) -> None:
        """Makes room for ``capacity`` tokens in all, or gives room back, by a copy of one layer
        after the other."""
        if not self.length <= capacity:
            raise ValueError(f"{self.length} tokens do not fit a cache of {capacity}")
        for index, old in enumerate(self._layers):
            heads, head_dim = old.shape[1], old.shape[3]
            new = old.new_empty((2, heads, capacity, head_dim))
            new[:, :, : self.length] = old[:, :, : self.length]
            self._layers[index] = new
        self._addresses = None
        self.capacity = capacity
