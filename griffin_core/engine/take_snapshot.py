"""How a snapshot of an engine is taken, in its thread."""

from __future__ import annotations

from griffin_core.engine.parts import EngineParts
from griffin_core.engine.session import Session
from griffin_core.engine.snapshot import (
    BytesSnapshot,
    CacheSnapshot,
    EngineSnapshot,
    RunForm,
    SessionSnapshot,
    ViewSnapshot,
)
from griffin_core.engine.timeouts import next_due_s


def take_snapshot(parts: EngineParts, *, contents: bool = False) -> EngineSnapshot:
    """Everything that is held now; see ``Engine.snapshot``."""
    budget, sessions, views = parts.memory.budget, parts.sessions, parts.views
    return EngineSnapshot(
        sessions=tuple(
            _snapshot_session(session, parts.groups.form_of(session), contents=contents)
            for session in sessions.table
        ),
        turns={turn_id: session.session_id for turn_id, session in sessions.turns.items()},
        scheduler=sessions.scheduler.snapshot(),
        handoffs=parts.session_prefills.snapshot(),
        prefills=parts.prefill_queue.snapshot(),
        views=tuple(
            ViewSnapshot(
                users=view.users, nbytes=view.nbytes, ready=view.ready, pending=len(view.pending)
            )
            for view in views.held
        ),
        groups=parts.groups.snapshot(),
        free_slots=parts.slots.free,
        slots_in_use=parts.sampler.in_use,
        nbytes=BytesSnapshot(
            limit=budget.limit,
            idle_limit=budget.idle_limit,
            held=budget.held,
            peak=budget.peak,
            views=views.nbytes,
        ),
        next_due_s=next_due_s(sessions.scheduler, parts.limits.reader_timeout_s),
    )


def _snapshot_session(session: Session, form: RunForm | None, *, contents: bool) -> SessionSnapshot:
    """Takes a snapshot of a session.

    Args:
        form: what its next step runs on.
        contents: whether to include its tokens and a copy of its statistic.
    """
    cache, view = session.cache, session.view
    statistic = session.statistics.s2.clone() if contents and session.statistics else None
    return SessionSnapshot(
        session_id=session.session_id,
        turn_id=session.turn_id,
        state=session.state,
        slot=session.slot,
        in_flight=session.in_flight,
        stalled=bool(session.clock.stalled),
        in_turn=session.in_turn,
        turn_generated=session.turn_generated,
        total_tokens=len(session.tokens),
        cache=None
        if cache is None
        else CacheSnapshot(tokens=cache.length, capacity=cache.capacity, nbytes=cache.nbytes),
        reserved_kv_bytes=session.reservation.kv,
        view_bytes=session.view_bytes,
        view=None if view is None else id(view),
        form=form,
        runs_on=None if view is None else view.slim,
        slim=session.slim,
        tokens=tuple(session.tokens) if contents else None,
        statistic=statistic,
    )
