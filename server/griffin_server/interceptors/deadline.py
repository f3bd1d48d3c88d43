"""Ends calls that go on for too long, also those of clients that set no deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TypeVar

from griffin_core.errors import DeadlinePassed

T = TypeVar("T")


class CallClock:
    """The time of one call, which begins now. Create it in the call's task.

    The call is ended where it waits for its method, and not where it waits for its client: gRPC
    would not send a status then. A client that does not read has a clock of its own.

    Args:
        most_s: seconds that the call may take.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._ends = asyncio.get_running_loop().time() + most_s
        self._task = asyncio.current_task()
        self._waiting = self._over = False

    async def answer(self, response: Awaitable[T]) -> T:
        """The response of the method.

        Raises:
            DeadlinePassed: the call's time is over.
        """
        try:
            async with asyncio.timeout_at(self._ends) as time:
                return await response
        except TimeoutError:
            if not time.expired():
                raise
            raise self._passed() from None

    async def answers(self, responses: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """The responses of the method.

        Raises:
            DeadlinePassed: the call's time is over.
        """
        assert self._task is not None
        timer = asyncio.get_running_loop().call_at(self._ends, self._end)
        try:
            while not self._over:
                self._waiting = True
                try:
                    response = await anext(responses)
                except StopAsyncIteration:
                    return
                except asyncio.CancelledError:
                    if self._over and not self._task.uncancel():
                        break
                    raise
                finally:
                    self._waiting = False
                yield response
            raise self._passed()
        finally:
            timer.cancel()

    def _end(self) -> None:
        self._over = True
        if self._waiting and self._task is not None:
            self._task.cancel()

    def _passed(self) -> DeadlinePassed:
        return DeadlinePassed(
            f"the call took longer than the server's {self._most_s:g} s (--max-call-s)"
        )
