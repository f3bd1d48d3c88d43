"""When a session pauses for a dense pass: at the end of its warm-up, and for checks."""

from __future__ import annotations

from griffin_core.engine.session import Session


def warming_up(session: Session) -> bool:
    """Whether it runs dense because its experts are still to be chosen by more tokens."""
    warmup = session.selection.warmup_tokens
    if not warmup or session.statistics is None or session.slim is None:
        return False
    return session.statistics.tokens < warmup and session.slim.prunes


def is_warm(session: Session) -> bool:
    """Whether its warm-up is over: the tokens that are to choose have run."""
    return warming_up(session) and session.cache_length >= _warm_at(session)


def check_due(session: Session) -> bool:
    """Whether a dense pass is to check its last tokens before it runs on."""
    return 0 < session.check_at <= session.cache_length


def tries_slim(session: Session) -> bool:
    """Whether it has run dense for so long that it is to prune again."""
    return session.control is not None and session.control.tries(session.cache_length)


def pauses_at(session: Session) -> int | None:
    """The length of its cache at which it waits for its next dense pass; None if none is ahead."""
    return _warm_at(session) if warming_up(session) else session.check_at or None


def _warm_at(session: Session) -> int:
    """The length of its cache at which enough tokens have run to choose its experts."""
    counted = 0 if session.statistics is None else session.statistics.tokens
    return session.uncounted_from + session.selection.warmup_tokens - counted
