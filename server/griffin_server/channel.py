"""From the engine's thread to a coroutine: events in order, with a bound that pauses the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Generic, TypeVar

E = TypeVar("E")


class Channel(Generic[E]):
    """A sink for the engine that a coroutine iterates over.

    Args:
        capacity: events that may wait to be read; the engine is told to pause at that many.
        wake: called when a full channel has been read down, so that the engine goes on.
    """

    def __init__(self, capacity: int, wake: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[E] = asyncio.Queue()
        self._capacity = capacity
        self._wake = wake
        # Each is written by one thread only; the difference may lag, never run ahead.
        self._put = 0
        self._taken = 0

    def put(self, event: E) -> None:
        """Engine's thread: hands an event on."""
        self._put += 1
        with suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    def ready(self) -> bool:
        """Engine's thread: whether there is room."""
        return self._put - self._taken < self._capacity

    async def __aiter__(self) -> AsyncIterator[E]:
        """Loop's thread: the events, without end."""
        while True:
            event = await self._queue.get()
            self._taken += 1
            if self._put - self._taken >= self._capacity - 1:  # it was full a moment ago
                self._wake()
            yield event
