"""Pulling a turn's prefill from the pool into the engine."""

from __future__ import annotations

from contextlib import aclosing

from griffin_core.engine.engine import Engine
from griffin_core.engine.prefill_queue import PrefillTask
from griffin_core.errors import EngineFault, GriffinError
from griffin_server.prefill_pool.router import PrefillRouter


async def pull_prefill(
    router: PrefillRouter,
    engine: Engine,
    turn_id: str,
    task: PrefillTask,
    timeout_s: float | None,
) -> None:
    """Hands a prefill's events to the turn that waits for them, or the error that ended it.

    Args:
        timeout_s: the time left until the deadline of the turn's call; None without a deadline.
    """
    try:
        async with aclosing(router.stream(task, timeout_s)) as events:
            async for event in events:
                engine.intake(turn_id, event)
    except GriffinError as error:
        engine.fail(turn_id, error)
    except Exception as error:
        engine.fail(turn_id, EngineFault(f"{type(error).__name__}: {error}"))
