"""The engine's prefill source: the pool of prefill servers reads the prompts of its turns.

The engine asks in its own thread; the pool is called on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import aclosing, contextmanager
from contextvars import Context, copy_context

from griffin_core.engine.ports import PrefillReceiver
from griffin_core.engine.task import PrefillTask
from griffin_core.errors import EngineFault, GriffinError, PrefillUnavailable
from griffin_server.prefill_pool.router import PrefillRouter


class TurnContexts:
    """The contexts of the calls that wait for turns, so that work for a turn outside its call has
    the call's trace and request id. Read and written by several threads."""

    def __init__(self) -> None:
        self._contexts: dict[str, Context] = {}

    @contextmanager
    def of_turn(self, turn_id: str) -> Iterator[None]:
        """Notes that the current context is that of a turn's call."""
        self._contexts[turn_id] = copy_context()
        try:
            yield
        finally:
            del self._contexts[turn_id]

    def get(self, turn_id: str) -> Context:
        """A copy of the context of a turn's call; an empty one if the call has ended."""
        return self._contexts.get(turn_id, Context()).copy()


class PoolSource:
    """A ``PrefillSource`` with a pool of servers. Open it before the engine's first session.

    Args:
        contexts: of the calls whose prompts are read.
    """

    def __init__(self, contexts: TurnContexts) -> None:
        self._contexts = contexts
        self._pulls: set[asyncio.Task[None]] = set()

    def open(self, router: PrefillRouter) -> None:
        """Sets the pool. It is called on the event loop that runs now."""
        self._router = router
        self._loop = asyncio.get_running_loop()

    def start(
        self, turn_id: str, task: PrefillTask, deadline: float | None, receiver: PrefillReceiver
    ) -> Future[None]:
        """See ``PrefillSource``. Cancelling the future ends the call of the prefill server."""
        pull = self._pull(task, deadline, receiver)
        run = asyncio.run_coroutine_threadsafe
        return self._contexts.get(turn_id).run(run, pull, self._loop)

    async def _pull(
        self, task: PrefillTask, deadline: float | None, receiver: PrefillReceiver
    ) -> None:
        pull = asyncio.current_task()
        assert pull is not None
        self._pulls.add(pull)
        pull.add_done_callback(self._pulls.discard)
        timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            async with aclosing(self._router.stream(task, timeout_s)) as events:
                async for event in events:
                    receiver.receive(event)
        except asyncio.CancelledError:
            if not pull.cancelling():  # not by the engine: the channel was closed
                receiver.fail(PrefillUnavailable("prefill: the call was ended"))
            raise
        except GriffinError as error:
            receiver.fail(error)
        except Exception as error:
            receiver.fail(EngineFault.of(error))

    async def close(self) -> None:
        """Waits for the prefills that the engine has cancelled, once it has stopped."""
        await asyncio.gather(*self._pulls, return_exceptions=True)
