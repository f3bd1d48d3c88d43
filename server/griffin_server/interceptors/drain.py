"""Refuses calls while the server loads its model and once it drains, and waits for running ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from griffin_core.errors import EngineStopped, GriffinError, NotReady
from griffin_server.interceptors.call import Call

LOADING_RETRY_S = 2.0
"""The retry hint while the model is loading, which may take seconds or minutes."""


class Drain:
    """Counts the running calls and decides whether new ones are admitted."""

    def __init__(self) -> None:
        self.active = 0
        """The number of calls being served."""
        self._draining = False
        self._refusal: Callable[[], GriffinError] | None = _loading
        self._idle = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether new calls are admitted."""
        return self._refusal is None

    @property
    def draining(self) -> bool:
        """Whether ``drain`` has been called."""
        return self._draining

    def open(self) -> None:
        """Admits calls from now on, unless the server is draining already."""
        if not self._draining:
            self._refusal = None

    async def drain(self, grace_s: float) -> None:
        """Refuses new calls, and waits until the running ones have ended or the grace is over."""
        self._draining = True
        self._refusal = _shutting_down
        if self.active:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)

    def force_stop(self) -> None:
        """Lets ``drain`` return at once."""
        self._idle.set()

    @asynccontextmanager
    async def count(self, call: Call) -> AsyncIterator[None]:
        """Counts a call as running until its status has been sent."""
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            if self._draining and not self.active:
                self._idle.set()

    @asynccontextmanager
    async def admit(self, call: Call) -> AsyncIterator[None]:
        """Refuses a call that comes too early or too late.

        Raises:
            NotReady: the model is loading.
            EngineStopped: the server is draining.
        """
        if self._refusal is not None:
            raise self._refusal()
        yield


def _loading() -> NotReady:
    return NotReady(
        "the server is starting: its model is still loading", retry_after_s=LOADING_RETRY_S
    )


def _shutting_down() -> EngineStopped:
    return EngineStopped("the server is shutting down")
