"""Bytes of sessions: what is held, what may be held, and what is evicted when they run short."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """A number of bytes that KV caches and slim views are taken from. Owned by one thread.

    Only bytes that the scheduler has reserved are acquired, so ``acquire`` finds room once
    everything has been evicted that is kept only because there was room.

    Args:
        limit: bytes that may be held.
        idle_limit: bytes of these that kept sessions may hold between their turns.
    """

    def __init__(self, limit: int, idle_limit: int = 0) -> None:
        self.limit = limit
        self.idle_limit = idle_limit
        self.held = 0
        self.peak = 0
        """The most that was ever held."""
        self._evict: Callable[[], bool] = lambda: False

    def on_short(self, evict: Callable[[], bool]) -> None:
        """Sets what is called when bytes run short: it releases some, or returns False."""
        self._evict = evict

    def acquire(self, size: int) -> None:
        """Counts bytes as held, before they are allocated.

        Raises:
            MemoryError: nothing more can be evicted. This is a bug: what is acquired must have
                been reserved.
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
