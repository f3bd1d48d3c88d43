"""A prompt that this server's own engine runs for a call, and for no session."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from griffin_core.decode.events import Failed
from griffin_core.engine import Engine
from griffin_core.prefill import LayerActivations, PrefillEvent, PrefillFinished
from griffin_core.prefill_queue import PrefillBegun, PrefillStreamEvent, PrefillTask
from griffin_server.channel import Channel, Mail
from griffin_server.ops.tracing import spans_var


async def run_prefill(
    engine: Engine, task: PrefillTask, mail: Mail, *, events_ahead: int
) -> AsyncGenerator[PrefillBegun | PrefillEvent | LayerActivations, None]:
    """Runs a prompt to its end, PrefillFinished. Closing the iterator ends it at once.

    Args:
        mail: what brings the engine's events here.
        events_ahead: results that may wait to be read before the prompt is paused.

    Raises:
        GriffinError: what the engine says went wrong.
    """
    channel = Channel[PrefillStreamEvent](events_ahead, engine.wake, mail)
    spans = spans_var.get()
    spans.note(prompt_tokens=len(task.token_ids), density=task.selection.density)
    spans.queued(time.monotonic())
    run = engine.prefill(task, channel)
    try:
        async for event in channel:
            spans.take(event)
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, PrefillFinished):
                return
    finally:
        run.cancel()
        engine.wake()
