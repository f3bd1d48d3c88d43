"""What becomes due by time: clients that do not read, and kept sessions that expire.

The session of a client that does not read is paused, and ended after a while.
"""

from __future__ import annotations

import time

from griffin_core.engine.scheduler import Scheduler
from griffin_core.engine.session import Session, State

LONGEST_WAIT_S = 3600.0
"""Longest time until something is due, since a queue's time-out must be finite."""


def check_readers(scheduler: Scheduler, timeout_s: float) -> list[Session]:
    """Notes which sessions' sinks are not ready.

    Returns:
        The sessions whose sink has not been ready for ``timeout_s``.
    """
    now = time.monotonic()
    late = []
    for session in scheduler.live:
        clock = session.clock
        if session.state is not State.DECODE or session.sink.ready():
            clock.stalled = 0.0
        elif not clock.stalled:
            clock.stalled = now
        elif now - clock.stalled >= timeout_s:
            late.append(session)
    return late


def next_due_s(scheduler: Scheduler, timeout_s: float) -> float | None:
    """Seconds until a reader is late or a kept session expires; None if nothing becomes due.

    Args:
        timeout_s: as in ``check_readers``.
    """
    stalled = [session.clock.stalled for session in scheduler.live if session.clock.stalled]
    due = [since + timeout_s - time.monotonic() for since in stalled]
    if (expiry_s := scheduler.next_expiry_s()) is not None:
        due.append(expiry_s)
    return max(0.0, min(*due, LONGEST_WAIT_S)) if due else None
