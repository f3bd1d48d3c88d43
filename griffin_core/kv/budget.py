"""Bytes of sessions: what is held, what may be held, and what gives way."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """A number of bytes that KV caches and slim views are taken from. Owned by one thread.

    Who takes has reserved before (``Scheduler``), so ``take`` finds room once everything that is
    kept only because there was room has gone.

    Args:
        limit: bytes that may be held.
        idle_limit: bytes of them that kept sessions may hold between their turns.
    """

    def __init__(self, limit: int, idle_limit: int = 0) -> None:
        self.limit = limit
        self.idle_limit = idle_limit
        self.held = 0
        self.peak = 0
        """The most that was ever held."""
        self._give_way: Callable[[], bool] = lambda: False

    def on_short(self, give_way: Callable[[], bool]) -> None:
        """Sets what is called when bytes run short: it gives some back, or returns False."""
        self._give_way = give_way

    def take(self, size: int) -> None:
        """Counts bytes as held, before they are allocated.

        Raises:
            MemoryError: nothing more gives way. A bug: nobody may take what was not reserved.
        """
        while self.held + size > self.limit:
            if not self._give_way():
                raise MemoryError(
                    f"session memory: {size} bytes asked for, {self.held} of {self.limit} held"
                )
        self.held += size
        self.peak = max(self.peak, self.held)

    def give_back(self, size: int) -> None:
        """Counts bytes as free again."""
        self.held -= size
