"""The memory budget of sessions: bytes held, the limit, and eviction when bytes run short."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """The bytes that KV caches and slim views may use. Owned by one thread.

    Callers reserve bytes with the scheduler before they acquire them, so ``acquire`` succeeds once
    everything evictable has been evicted.

    Args:
        limit: the most bytes that may be held.
        idle_limit: the most of these that kept sessions may hold between their turns.
    """

    def __init__(self, limit: int, idle_limit: int = 0) -> None:
        self.limit = limit
        self.idle_limit = idle_limit
        self.held = 0
        self.peak = 0
        """The most bytes that were ever held."""
        self._evict: Callable[[], bool] = lambda: False

    def on_short(self, evict: Callable[[], bool]) -> None:
        """Sets the function that is called when bytes run short: it evicts something, or returns
        False."""
        self._evict = evict

    def acquire(self, size: int) -> None:
        """Counts bytes as held, before they are allocated.

        Raises:
            MemoryError: nothing is left to evict. This is a bug: all bytes must be reserved before
                they are acquired.
        """
        while self.held + size > self.limit:
            if not self._evict():
                raise MemoryError(
                    f"session memory: {size} bytes asked for, {self.held} of {self.limit} held"
                )
        self.held += size
        self.peak = max(self.peak, self.held)

    def release(self, size: int) -> None:
        """Counts bytes as free again."""
        self.held -= size
