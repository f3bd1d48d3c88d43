"""Keys and values of one sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from griffin_core.kv.pool import KvPool


class KvCache:
    """Consecutive slots of a pool, filled from the front. Made by ``KvPool.allocate``.

    A layer is written as its tokens pass through it, so within a step layers differ in how far
    they are filled; ``length`` is how many tokens every layer holds and moves with ``advance``.

    Args:
        first_slot: KV slot of the first token. It may change when the pool makes room.
        capacity: most tokens.
    """

    def __init__(self, pool: KvPool, first_slot: int, capacity: int) -> None:
        self.pool = pool
        self.first_slot = first_slot
        self.capacity = capacity
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its slots in all layers."""
        return self.capacity * self.pool.token_bytes

    def write(self, layer: int, start: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values at positions start..start+T.

        Args:
            kv: [T, 2 · kv_heads, head_dim], the heads of the keys, then those of the values.

        Returns:
            The layer's keys and values up to there, each [kv_heads, start + T, head_dim], without
            a copy.
        """
        tokens, _, head_dim = kv.shape
        end = start + tokens
        own = kv.view(tokens, 2, -1, head_dim).permute(1, 2, 0, 3)
        self.slice(layer, start, end).copy_(own)
        keys, values = self.slice(layer, 0, end).unbind()
        return keys, values

    def slice(self, layer: int, start: int, end: int) -> Tensor:
        """A view [2, kv_heads, end - start, head_dim] of keys and values, to read or to fill.

        Raises:
            ValueError: positions outside the cache.
        """
        if not 0 <= start <= end <= self.capacity:
            raise ValueError(f"tokens {start}..{end} do not fit a cache of {self.capacity}")
        first = self.first_slot
        return self.pool.layers[layer][:, :, first + start : first + end]

    def advance(self, tokens: int) -> None:
        """Notes that every layer now holds that many tokens more."""
        self.length += tokens

    def rewind(self, length: int) -> None:
        """Forgets what is after the first ``length`` tokens.

        Raises:
            ValueError: the cache holds fewer tokens.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind {self.length} tokens to {length}")
        self.length = length

    def resize(self, capacity: int) -> None:
        """Makes room for ``capacity`` tokens in all, or gives room back; see ``KvPool.resize``."""
        self.pool.resize(self, capacity)

    def free(self) -> None:
        """Gives all room back."""
        self.pool.free(self)
