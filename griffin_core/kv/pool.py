"""One pool of memory for the keys and values of all sequences, allocated by the token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from griffin_core.kv.cache import KvCache
from griffin_core.spec.model import ModelSpec

NULL_SLOT = 0
"""The null slot: the KV slot that all padding rows write to. No sequence reads it."""

MOVE_TOKENS = 4096
"""The most tokens of one layer that are copied through temporary memory at once."""


def kv_bytes(spec: ModelSpec, dtype: torch.dtype, tokens: int) -> int:
    """Returns the bytes that the keys and values of ``tokens`` tokens take in all layers."""
    return len(spec.layers) * 2 * spec.num_kv_heads * spec.head_dim * tokens * dtype.itemsize


class KvPool:
    """The keys and values of a fixed number of tokens in every layer. A *KV slot* is the index of a
    token in the pool.

    A sequence has consecutive slots (``KvCache``). When the free slots are fragmented, the pool
    compacts by moving sequences, so ``allocate`` succeeds whenever enough slots are free in all.

    Owned by one thread. On a GPU, moves happen in stream order, so steps that were launched earlier
    still read the old slots.

    Args:
        layers: L tensors [2, kv_heads, slots, head_dim], keys, then values. Slot 0 is the null
            slot.
        trim: called with (first slot, end slot) of freed slots, to return their memory to the
            system; None keeps it.
    """

    def __init__(
        self, layers: Sequence[Tensor], trim: Callable[[int, int], None] | None = None
    ) -> None:
        self.layers = layers
        for layer in layers:
            layer[:, :, NULL_SLOT].zero_()
        tokens = layers[0].shape[2] - 1
        self.tokens = tokens
        """The number of slots, the null slot not counted."""
        self.token_bytes = sum(layer[:, :, 0].nbytes for layer in layers)
        self._trim = trim
        # Weak references, so that a pool with one cache is freed with it at once, without the
        # cyclic garbage collector.
        self._caches: WeakSet[KvCache] = WeakSet()
        self._holes = [(NULL_SLOT + 1, tokens + 1)]  # (first, end) of free slots, ascending
        self.free_tokens = tokens
        """The number of slots that belong to no sequence."""

    def allocate(self, capacity: int) -> KvCache:
        """Allocates an empty cache for ``capacity`` tokens.

        Raises:
            MemoryError: fewer slots are free.
        """
        self._check_free(capacity)
        first = self._take(capacity)
        if first is None:
            self._compact()
            first = self._take(capacity)
            assert first is not None
        cache = KvCache(self, first, capacity)
        self._caches.add(cache)
        return cache

    def free(self, cache: KvCache) -> None:
        """Frees a cache's slots. Does nothing if they are free already."""
        if cache in self._caches:
            self._caches.remove(cache)
            self._give_back(cache.first_slot, cache.first_slot + cache.capacity)
            cache.capacity = cache.length = 0

    def resize(self, cache: KvCache, capacity: int) -> None:
        """Changes the capacity of a cache to ``capacity`` tokens. The cache may move.

        Raises:
            ValueError: the cache holds more tokens.
            MemoryError: fewer slots are free.
        """
        if capacity < cache.length:
            raise ValueError(f"{cache.length} tokens do not fit a cache of {capacity}")
        end, more = cache.first_slot + cache.capacity, capacity - cache.capacity
        if more <= 0:
            cache.capacity = capacity
            self._give_back(end + more, end)
            return
        self._check_free(more)
        if self._take(more, at=end) is None:
            first = self._take(capacity)
            if first is None:
                self._compact(last=cache)
                self._take(more, at=cache.first_slot + cache.capacity)
            else:
                old = cache.first_slot
                self._move([(cache, first)])
                self._give_back(old, end)
        cache.capacity = capacity

    def _check_free(self, tokens: int) -> None:
        if tokens > self.free_tokens:
            raise MemoryError(f"KV pool: {tokens} tokens asked for, {self.free_tokens} are free")

    def _take(self, tokens: int, at: int | None = None) -> int | None:
        """Takes slots from the first hole that is large enough, or from the hole that begins at
        slot ``at``. Returns the first slot, or None if there is no such hole."""
        holes = self._holes
        if at is None:
            index = next((i for i, (a, b) in enumerate(holes) if b - a >= tokens), len(holes))
        else:
            index = bisect_left(holes, (at, at))
        if index == len(holes):
            return None
        first, end = holes[index]
        if (at is not None and first != at) or end - first < tokens:
            return None
        holes[index : index + 1] = [(first + tokens, end)] if end - first > tokens else []
        self.free_tokens -= tokens
        return first

    def _give_back(self, first: int, end: int) -> None:
        if first == end:
            return
        self._trim_slots(first, end)
        self.free_tokens += end - first
        holes = self._holes
        index = bisect_left(holes, (first, end))
        if index < len(holes) and holes[index][0] == end:
            end = holes.pop(index)[1]
        if index and holes[index - 1][1] == first:
            index -= 1
            first = holes.pop(index)[0]
        holes.insert(index, (first, end))

    def _compact(self, last: KvCache | None = None) -> None:
        """Moves all caches to the front, ``last`` after all others."""
        moves, end = [], NULL_SLOT + 1
        others = [cache for cache in self._caches if cache is not last]
        for cache in sorted(others, key=lambda each: each.first_slot):
            moves.append((cache, end))
            end += cache.capacity
        self._move(moves, None if last is None else (last, end))
        end += 0 if last is None else last.capacity
        self._holes = [(end, self.tokens + 1)] if end <= self.tokens else []
        self._trim_slots(end, self.tokens + 1)

    def _move(
        self, moves: Sequence[tuple[KvCache, int]], last: tuple[KvCache, int] | None = None
    ) -> None:
        """Moves caches to other first slots, in order.

        It allocates all its temporary memory before it moves anything, so that no sequence is left
        half moved: one layer of ``last``, and one layer of up to ``MOVE_TOKENS`` tokens.

        Args:
            moves: a move may overwrite the cache's own old slots from the front, but not a cache
                that moves later.
            last: a cache that other moves may overwrite; it is written after them.
        """
        runs = _runs((cache.first_slot, to, cache.capacity) for cache, to in moves)
        overlapping = [tokens for first, to, tokens in runs if abs(to - first) < tokens]
        scratch = self._temporary(min(MOVE_TOKENS, max(overlapping, default=0)))
        saved = self._temporary(0 if last is None else last[0].capacity)
        for layer in self.layers:
            if last is not None:
                saved.copy_(_slots(layer, last[0].first_slot, last[0].capacity))
            for first, to, tokens in runs:
                _move_slots(layer, first, to, tokens, scratch)
            if last is not None:
                _slots(layer, last[1], last[0].capacity).copy_(saved)
        for cache, to in [*moves, *([] if last is None else [last])]:
            cache.first_slot = to

    def _temporary(self, tokens: int) -> Tensor:
        """Allocates room for one layer of ``tokens`` tokens."""
        return torch.empty_like(
            self.layers[0][:, :, :tokens], memory_format=torch.contiguous_format
        )

    def _trim_slots(self, first: int, end: int) -> None:
        if self._trim is not None and end > first:
            self._trim(first, end)


def _runs(moves: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Joins moves of neighbours by the same distance, and drops those that go nowhere.

    Args:
        moves: (first slot, new first slot, tokens), ascending.
    """
    runs: list[tuple[int, int, int]] = []
    for first, to, tokens in moves:
        if first == to:
            continue
        if runs:
            before, before_to, before_tokens = runs[-1]
            if (first - before, to - before_to) == (before_tokens, before_tokens):
                runs[-1] = (before, before_to, before_tokens + tokens)
                continue
        runs.append((first, to, tokens))
    return runs


def _move_slots(layer: Tensor, first: int, to: int, tokens: int, scratch: Tensor) -> None:
    """Copies slots of a layer to others; towards the front if the two overlap, through
    ``scratch`` [2, kv_heads, n, head_dim]."""
    if abs(to - first) >= tokens:
        _slots(layer, to, tokens).copy_(_slots(layer, first, tokens))
        return
    assert to < first
    size = scratch.shape[2]
    for at in range(0, tokens, size):
        part = scratch[:, :, : min(size, tokens - at)]
        part.copy_(_slots(layer, first + at, part.shape[2]))
        _slots(layer, to + at, part.shape[2]).copy_(part)


def _slots(layer: Tensor, first: int, tokens: int) -> Tensor:
    return layer[:, :, first : first + tokens]
