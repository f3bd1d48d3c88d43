"""The keys and values of one sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from griffin_core.kv.pool import KvPool


class KvCache:
    """Consecutive slots of a pool, filled from the front. Made by ``KvPool.allocate``.

    Layers are written one after the other, so during a step they are filled to different lengths;
    ``length`` is the number of tokens that every layer holds, and grows with ``advance``.

    Args:
        first_slot: KV slot of the first token. It may change when the pool compacts.
        capacity: the most tokens that fit.
    """

    def __init__(self, pool: KvPool, first_slot: int, capacity: int) -> None:
        self.pool = pool
        self.first_slot = first_slot
        self.capacity = capacity
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Size of its slots in all layers, in bytes."""
        return self.capacity * self.pool.token_bytes

    def write(self, layer: int, start: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values at positions start..start+T.

        Args:
            kv: [T, 2 · kv_heads, head_dim], the heads of the keys, then those of the values.

        Returns:
            Views of the layer's keys and values up to there, each [kv_heads, start + T, head_dim].
        """
        tokens, _, head_dim = kv.shape
        end = start + tokens
        own = kv.view(tokens, 2, -1, head_dim).permute(1, 2, 0, 3)
        self.slice(layer, start, end).copy_(own)
        keys, values = self.slice(layer, 0, end).unbind()
        return keys, values

    def slice(self, layer: int, start: int, end: int) -> Tensor:
        """Returns a view [2, kv_heads, end - start, head_dim] of keys and values, to read or to
        fill.

        Raises:
            ValueError: the positions are outside the cache.
        """
        if not 0 <= start <= end <= self.capacity:
            raise ValueError(f"tokens {start}..{end} do not fit a cache of {self.capacity}")
        first = self.first_slot
        return self.pool.layers[layer][:, :, first + start : first + end]

    def advance(self, tokens: int) -> None:
        """Records that every layer now holds ``tokens`` more tokens."""
        self.length += tokens

    def rewind(self, length: int) -> None:
        """Drops all tokens after the first ``length``.

        Raises:
            ValueError: the cache holds fewer tokens.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind {self.length} tokens to {length}")
        self.length = length

    def resize(self, capacity: int) -> None:
        """Changes the capacity to ``capacity`` tokens; see ``KvPool.resize``."""
        self.pool.resize(self, capacity)

    def free(self) -> None:
        """Returns all slots to the pool."""
        self.pool.free(self)
