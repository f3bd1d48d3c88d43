"""From the engine's thread to coroutines: events in order, with a bound that pauses the engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

E = TypeVar("E")


class Mail:
    """What the engine has put into the channels of one event loop and not yet been delivered.

    A step puts an event into the channel of every session. The loop is woken once for all of them:
    a wake-up each cost an eighth of what a token costs in all (docs/LOG.md). Made on the loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._called = False

    def put(self, queue: asyncio.Queue[E], event: E) -> None:
        """Engine's thread: has an event put into a queue."""
        self._events.append((queue, event))
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop is closed: nobody is left to read
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before the events are taken: whatever comes behind the last of them calls again.
        self._called = False
        while self._events:
            queue, event = self._events.popleft()
            queue.put_nowait(event)


class Channel(Generic[E]):
    """A sink for the engine that a coroutine iterates over.

    Args:
        capacity: events that may wait to be read; the engine is told to pause at that many.
        wake: called when a full channel has been read down, so that the engine goes on.
        mail: of the loop the coroutine runs on.
    """

    def __init__(self, capacity: int, wake: Callable[[], None], mail: Mail) -> None:
        self._mail = mail
        self._queue: asyncio.Queue[E] = asyncio.Queue()
        self._capacity = capacity
        self._wake = wake
        # Each is written by one thread only; the difference may lag, never run ahead.
        self._put = 0
        self._taken = 0

    def put(self, event: E) -> None:
        """Engine's thread: hands an event on."""
        self._put += 1
        self._mail.put(self._queue, event)

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
