"""Runs a prompt on this server's engine for a call, without a session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Failed, PrefillBegun, PrefillStreamEvent
from griffin_core.engine.task import PrefillTask
from griffin_core.errors import ReaderTooSlow
from griffin_core.forward.events import (
    LayerActivations,
    PrefillEvent,
    PrefillFinished,
)
from griffin_server.rpc.output_queue import LoopBridge, OutputQueue
from griffin_server.telemetry.tracing import spans_var

EVENT_S = 0.5
"""Seconds that a reader may take for each event without being taken for one that stops: over a slow
network an event, which may be a hundred megabytes of KV, takes as long."""

EVENTS_AHEAD = 16
"""The number of unread events at which the prompt joins no further pass."""


async def run_prefill(
    engine: Engine, task: PrefillTask, bridge: LoopBridge
) -> AsyncGenerator[PrefillBegun | PrefillEvent | LayerActivations, None]:
    """Runs a prompt to its end, PrefillFinished. The work ends at once when the iterator is closed,
    or when it has waited for its reader for the limits' reader_timeout_s, all events together but
    ``EVENT_S`` for each: a reader that takes one now and then holds its place hardly longer than
    one that takes none.

    Args:
        bridge: delivers the engine's events to this loop.

    Raises:
        ReaderTooSlow: the work waited for its reader for too long.
        GriffinError: the prefill failed.
    """
    queue = OutputQueue[PrefillStreamEvent](EVENTS_AHEAD, engine.wake, bridge)
    spans, loop = spans_var.get(), asyncio.get_running_loop()
    spans.note(prompt_tokens=len(task.token_ids), density=task.selection.density)
    spans.queued(time.monotonic())
    run = engine.prefill(task, queue)
    timeout_s = left_s = engine.limits.reader_timeout_s

    def end() -> None:
        run.cancel()
        engine.wake()

    try:
        async for event in queue:
            spans.take(event)
            if isinstance(event, Failed):
                raise event.error
            clock = loop.time()
            reader_timeout = loop.call_later(left_s, end)
            try:
                yield event
            finally:
                reader_timeout.cancel()
            took_s = loop.time() - clock - EVENT_S
            left_s = min(timeout_s, max(0.0, left_s - took_s))
            if isinstance(event, PrefillFinished):
                return
            if run.cancelled:
                raise ReaderTooSlow(f"nobody has read for {timeout_s:g} s")
    finally:
        end()
