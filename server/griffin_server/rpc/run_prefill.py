"""A prompt that this server's own engine runs for a call, and for no session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from griffin_core.decode.events import Failed
from griffin_core.engine import Engine
from griffin_core.errors import ReaderTooSlow
from griffin_core.prefill import LayerActivations, PrefillEvent, PrefillFinished
from griffin_core.prefill_queue import PrefillBegun, PrefillStreamEvent, PrefillTask
from griffin_server.rpc.output_queue import Channel, Mail
from griffin_server.telemetry.tracing import spans_var

EVENTS_AHEAD = 16
"""Results that may wait to be read; with that many the prompt joins no further pass."""


async def run_prefill(
    engine: Engine, task: PrefillTask, mail: Mail
) -> AsyncGenerator[PrefillBegun | PrefillEvent | LayerActivations, None]:
    """Runs a prompt to its end, PrefillFinished. Closing the iterator ends it at once; so does
    whoever takes an event and does not come for the next within the limits' reader_timeout_s.

    Args:
        mail: what brings the engine's events here.

    Raises:
        ReaderTooSlow: somebody came too late.
        GriffinError: what the engine says went wrong.
    """
    channel = Channel[PrefillStreamEvent](EVENTS_AHEAD, engine.wake, mail)
    spans, loop = spans_var.get(), asyncio.get_running_loop()
    spans.note(prompt_tokens=len(task.token_ids), density=task.selection.density)
    spans.queued(time.monotonic())
    run = engine.prefill(task, channel)
    patience_s = engine.limits.reader_timeout_s

    def end() -> None:
        run.cancel()
        engine.wake()

    try:
        async for event in channel:
            spans.take(event)
            if isinstance(event, Failed):
                raise event.error
            losing_patience = loop.call_later(patience_s, end)
            try:
                yield event
            finally:
                losing_patience.cancel()
            if isinstance(event, PrefillFinished):
                return
            if run.cancelled:
                raise ReaderTooSlow(f"nobody has read for {patience_s:g} s")
    finally:
        end()
