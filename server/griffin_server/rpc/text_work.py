"""Threads that make tasks of requests: they tokenize. Large requests have a lane of their own, so
that small ones do not wait for them, and a lane that is full refuses more."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from griffin_core.errors import CapacityExhausted

T = TypeVar("T")

LARGE_BYTES = 64 << 10
"""The size from which a request is large. A text of that size takes some 20 ms to tokenize."""

RETRY_S = 1.0
"""The retry hint of a refusal."""


class Lane:
    """Some threads, and the requests that wait for them.

    Args:
        name: of the threads.
        threads: how many requests are worked on at once.
        most: how many are worked on or wait at most. One owner has at most half of them while
            others have some.
    """

    def __init__(self, name: str, threads: int, most: int) -> None:
        self._threads = ThreadPoolExecutor(threads, name)
        self._most = most
        self._of_owner: Counter[str] = Counter()

    async def run(self, work: Callable[[], T], owner: str) -> T:
        """Runs ``work`` on one of the threads. Work that nobody waits for any more keeps its place
        until it has ended.

        Raises:
            CapacityExhausted: too many requests wait, of this owner or of all.
        """
        own, all_of_them = self._of_owner[owner], self._of_owner.total()
        others = all_of_them - own
        if all_of_them >= self._most or (others and own >= self._most // 2):
            raise CapacityExhausted(
                f"{all_of_them} requests wait to be tokenized, {own} of them of this caller",
                retry_after_s=RETRY_S,
            )
        self._of_owner[owner] += 1
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        working.add_done_callback(lambda _: self._leave(owner))
        return await asyncio.shield(working)

    def _leave(self, owner: str) -> None:
        self._of_owner[owner] -= 1
        if not self._of_owner[owner]:
            del self._of_owner[owner]


class TextWork:
    """The lanes of a server.

    Args:
        max_queue: how many requests wait in the engine at most; as many wait here.
    """

    def __init__(self, max_queue: int) -> None:
        self._small = Lane("griffin-tokenize", threads=2, most=max(16, max_queue))
        self._large = Lane("griffin-tokenize-large", threads=1, most=8)

    async def run(self, work: Callable[[], T], size: int, owner: str) -> T:
        """Runs the work of a request of ``size`` bytes; see ``Lane.run``."""
        lane = self._large if size >= LARGE_BYTES else self._small
        return await lane.run(work, owner)
