"""What becomes of each command. Runs in the engine's thread."""

from __future__ import annotations

import logging

from griffin_core.engine.commands import (
    Ask,
    Cancel,
    CloseSession,
    Command,
    GetSession,
    GetSessionPage,
    GetUsage,
    HandoffEvent,
    HandoffFailed,
    ListSessions,
    Order,
    Prefill,
    Submit,
    TakeSnapshot,
    Wake,
)
from griffin_core.engine.parts import EngineParts
from griffin_core.engine.session import SessionPage, State, Usage
from griffin_core.engine.take_snapshot import take_snapshot

log = logging.getLogger(__name__)


def run_command(parts: EngineParts, command: Command) -> None:
    """Runs a command. A bug in one caller's command does not end the others' work."""
    try:
        if not isinstance(command, Ask):
            _run(parts, command)
        elif command.answer.set_running_or_notify_cancel():
            try:
                command.answer.set_result(_run(parts, command.question))
            except Exception as error:
                command.answer.set_exception(error)
    except Exception:
        log.exception("command failed")


def _run(parts: EngineParts, order: Order) -> object:
    """Does what an order says. Returns the answer if it is a question."""
    sessions, spec = parts.sessions, parts.decoder.spec
    match order:
        case Submit(task=task, sink=sink):
            parts.admission.submit(task, sink)
        case HandoffEvent(turn_id=turn_id, event=event):
            parts.admission.receive(turn_id, event)
        case HandoffFailed(turn_id=turn_id, error=error):
            parts.admission.receive(turn_id, error)
        case Cancel(turn_id=turn_id):
            sessions.cancel(turn_id)
        case Prefill(run=run):
            parts.prefill_queue.add(run, sessions.scheduler.retry_after_s)
        case CloseSession(session_id=session_id, owner=owner):
            sessions.close(session_id, owner)
        case GetSession(session_id=session_id, owner=owner):
            return sessions.table.find(session_id, owner).info(spec)
        case ListSessions():
            return [session.info(spec) for session in sessions.table]
        case GetSessionPage():
            return _page(parts, order)
        case GetUsage():
            return _usage(parts)
        case TakeSnapshot(contents=contents):
            return take_snapshot(parts, contents=contents)
        case Wake():
            pass
    return None


def _page(parts: EngineParts, wanted: GetSessionPage) -> SessionPage:
    table, spec = parts.sessions.table, parts.decoder.spec
    found = table.page(wanted.after, wanted.size + 1, wanted.owner)
    sessions = found[: wanted.size]
    return SessionPage(
        sessions=[session.info(spec) for session in sessions],
        last=sessions[-1].number if len(found) > wanted.size else None,
        total=table.count(wanted.owner),
    )


def _usage(parts: EngineParts) -> Usage:
    states, views = parts.sessions.scheduler.states(), parts.views.nbytes
    return Usage(
        sessions={state: states[state] for state in State},
        slim_view_bytes=views,
        kv_cache_bytes=parts.memory.budget.held - views,
        limit_bytes=parts.memory.budget.limit,
    )
