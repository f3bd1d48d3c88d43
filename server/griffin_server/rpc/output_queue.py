"""From the engine's thread to coroutines: events in order, with a bound that pauses the engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

E = TypeVar("E")


class LoopBridge:
    """The events that the engine has put into the queues of one event loop and that the loop has
    not delivered yet.

    A step puts an event into the queue of every session. The loop is woken once for all of them: a
    wake-up for each took an eighth of a token's total time (docs/LOG.md). Create it on the loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._woken = False

    def put(self, queue: asyncio.Queue[E], event: E) -> None:
        """On the engine's thread: has the loop put an event into a queue."""
        self._events.append((queue, event))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed, so there is no reader
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before the events are taken, so that an event put after the last of them wakes the loop.
        self._woken = False
        while self._events:
            queue, event = self._events.popleft()
            queue.put_nowait(event)


class OutputQueue(Generic[E]):
    """A sink for the engine that a coroutine iterates over.

    Args:
        capacity: the number of unread events at which the engine is told to pause.
        wake: called when a full queue has been read down, so that the engine goes on.
        bridge: the bridge to the loop that the coroutine runs on.
    """

    def __init__(self, capacity: int, wake: Callable[[], None], bridge: LoopBridge) -> None:
        self._bridge = bridge
        self._queue: asyncio.Queue[E] = asyncio.Queue()
        self._capacity = capacity
        self._wake = wake
        # Each is written by one thread only, so the difference may be too large but not too small.
        self._put = 0
        self._taken = 0

    def put(self, event: E) -> None:
        """On the engine's thread: adds an event."""
        self._put += 1
        self._bridge.put(self._queue, event)

    def ready(self) -> bool:
        """On the engine's thread: whether there is room for an event."""
        return self._put - self._taken < self._capacity

    async def __aiter__(self) -> AsyncIterator[E]:
        """On the loop's thread: the events, without end."""
        while True:
            event = await self._queue.get()
            self._taken += 1
            if self._put - self._taken >= self._capacity - 1:  # it was full a moment ago
                self._wake()
            yield event
