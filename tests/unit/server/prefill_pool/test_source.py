"""The pool as the engine's prefill source: asked in the engine's thread, served on the loop."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any, cast

import pytest

from griffin_core.engine.task import PrefillTask
from griffin_core.errors import EngineFault, PrefillUnavailable
from griffin_core.experts.selection import Selection
from griffin_core.forward.events import (
    PrefillEvent,
    PrefillRestarted,
)
from griffin_server.prefill_pool.router import PrefillRouter
from griffin_server.prefill_pool.source import PoolSource, TurnContexts

TASK = PrefillTask(token_ids=(1, 2, 3), selection=Selection(density=0.5))

caller: ContextVar[str] = ContextVar("caller", default="nobody")


class Receiver:
    """Keeps what a turn gets."""

    def __init__(self) -> None:
        self.got: queue.Queue[Any] = queue.Queue()

    def receive(self, event: PrefillEvent) -> None:
        self.got.put(event)

    def fail(self, error: Exception) -> None:
        self.got.put(error)

    async def next(self) -> Any:
        return await asyncio.to_thread(self.got.get, timeout=10)


class Router:
    """Streams one event, then waits, or fails."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.callers: list[str] = []
        self.timeouts: list[float | None] = []
        self.closed = asyncio.Event()

    async def stream(
        self, task: PrefillTask, timeout_s: float | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        assert task is TASK
        self.callers.append(caller.get())
        self.timeouts.append(timeout_s)
        try:
            yield PrefillRestarted()
            if self.error is not None:
                raise self.error
            await asyncio.sleep(60)
        finally:
            self.closed.set()


def opened(router: Router, contexts: TurnContexts) -> PoolSource:
    source = PoolSource(contexts)
    source.open(cast(PrefillRouter, router))
    return source


async def test_a_turn_gets_the_events_until_it_cancels() -> None:
    router, receiver = Router(), Receiver()
    source = opened(router, TurnContexts())
    handle = await asyncio.to_thread(source.start, "turn", TASK, None, receiver)
    assert isinstance(await receiver.next(), PrefillRestarted)
    await asyncio.to_thread(handle.cancel)
    await asyncio.wait_for(router.closed.wait(), 10)
    await source.close()
    assert receiver.got.empty()  # a prefill that was cancelled has not failed
    assert router.timeouts == [None]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PrefillUnavailable("no server"), PrefillUnavailable),
        (ZeroDivisionError(), EngineFault),
        (asyncio.CancelledError(), PrefillUnavailable),  # as gRPC has it when a channel is closed
    ],
)
async def test_an_error_of_the_pool_is_the_turns(
    error: BaseException, kind: type[Exception]
) -> None:
    receiver = Receiver()
    source = opened(Router(error), TurnContexts())
    await asyncio.to_thread(source.start, "turn", TASK, None, receiver)
    assert isinstance(await receiver.next(), PrefillRestarted)
    assert isinstance(await receiver.next(), kind)


async def test_a_prefill_has_the_context_and_the_deadline_of_its_call() -> None:
    contexts = TurnContexts()
    router, receiver = Router(), Receiver()
    source = opened(router, contexts)
    token = caller.set("its call")
    with contexts.of_turn("turn"):
        caller.reset(token)
        for turn_id in ("turn", "of no call"):
            deadline = time.monotonic() + 50
            handle = await asyncio.to_thread(source.start, turn_id, TASK, deadline, receiver)
            await receiver.next()
            handle.cancel()
    await source.close()
    assert router.callers == ["its call", "nobody"]
    assert all(left is not None and 40 < left <= 50 for left in router.timeouts)
