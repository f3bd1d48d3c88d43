"""Who may enter: sessions wait in order of arrival until count and bytes allow them in."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from griffin_core.decode.session import Session, State
from griffin_core.errors import CapacityExhausted

_LONGEST_WAIT_S = 3600.0  # a queue's time-out must be finite


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine may hold.

    Args:
        max_sessions: sessions in prefill or decode at once.
        max_queue: sessions, and prefills for other servers, that may wait.
        session_bytes: KV caches and slim views of all sessions together.
        session_ttl_s: how long a kept session may be idle.
        chunk_tokens: prompt tokens prefilled between two decode steps.
    """

    max_sessions: int = 16
    max_queue: int = 64
    session_bytes: int = 4 << 30
    session_ttl_s: float = 600.0
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        for name, least in (
            ("max_sessions", 1),
            ("max_queue", 0),
            ("session_bytes", 1),
            ("session_ttl_s", 0),
            ("chunk_tokens", 1),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: >= {least}")


class Scheduler:
    """Every session there is, and the bytes they have reserved. Owned by the engine's thread.

    A session reserves the most it can come to need when it is admitted, so one that has begun never
    runs out. Idle sessions give way to new ones, the longest idle first.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[Session] = deque()
        self._live: dict[str, Session] = {}
        self._idle: dict[str, Session] = {}  # oldest idle first
        self._turn_s = 1.0  # smoothed, for retry hints

    def __iter__(self) -> Iterator[Session]:
        """All sessions, oldest first."""
        # An idle session whose next turn waits is in two places.
        everyone = {s.session_id: s for s in (*self._waiting, *self.live, *self._idle.values())}
        return iter(sorted(everyone.values(), key=lambda session: session.opened))

    def find(self, session_id: str) -> Session | None:
        """A session, wherever it is."""
        found = self._live.get(session_id) or self._idle.get(session_id)
        return found or next((s for s in self._waiting if s.session_id == session_id), None)

    @property
    def live(self) -> list[Session]:
        """Sessions in prefill or decode."""
        return list(self._live.values())

    @property
    def reserved_bytes(self) -> int:
        """What admitted and idle sessions hold."""
        return sum(s.reserved_bytes for s in (*self._live.values(), *self._idle.values()))

    def enqueue(self, session: Session, bytes_needed: int) -> None:
        """Puts a new session, or an idle one with a new turn, at the end of the queue.

        Args:
            bytes_needed: the most it will hold, what it holds now included.

        Raises:
            CapacityExhausted: the queue is full, or the session alone is over the limit.
        """
        if bytes_needed > self._limits.session_bytes:
            raise CapacityExhausted(
                f"memory: the request needs {bytes_needed} bytes of KV cache and slim view; the "
                f"server allows {self._limits.session_bytes} in all. Ask for fewer tokens",
                retry_after_s=None,
            )
        full = len(self._waiting) >= self._limits.max_queue
        if full and (self._waiting or not self._fits(session, bytes_needed)):
            raise CapacityExhausted(
                f"queue: {len(self._waiting)} requests wait already, the most this server allows",
                retry_after_s=self.retry_after_s,
            )
        session.needed_bytes = bytes_needed
        session.state = State.QUEUED
        self._waiting.append(session)

    @property
    def retry_after_s(self) -> float:
        """When a place in the queue is likely to be free: the usual length of a turn, shared by the
        sessions that run at once."""
        return max(0.1, self._turn_s / self._limits.max_sessions)

    def admit(self) -> list[Session]:
        """Sessions that may begin now, in order of arrival. None overtakes, unless nothing runs
        that the first in line could wait for."""
        admitted = []
        while session := self._next():
            self._waiting.remove(session)
            self._make_room(session)
            self._idle.pop(session.session_id, None)
            session.reserved_bytes = session.needed_bytes
            session.state = State.PREFILL
            session.clock.admitted = time.monotonic()
            self._live[session.session_id] = session
            admitted.append(session)
        return admitted

    def _next(self) -> Session | None:
        may_overtake = not self._live
        for session in self._waiting:
            if self._fits(session, session.needed_bytes):
                return session
            if not may_overtake:
                return None
        return None

    def deadlocked(self) -> Session | None:
        """The youngest kept session whose next turn waits, if nothing runs and nobody in the queue
        fits: what it holds must go."""
        if self._live or not self._waiting or self._next():
            return None
        return next((s for s in reversed(self._waiting) if s.session_id in self._idle), None)

    def keep(self, session: Session) -> None:
        """A live session's turn is over; it stays for the next."""
        self._note_turn(session)
        del self._live[session.session_id]
        session.state = State.IDLE
        self._idle[session.session_id] = session

    def drop(self, session: Session) -> None:
        """Forgets a session, wherever it is, and with it all it holds."""
        if session.session_id in self._live and session.clock.first_token:
            self._note_turn(session)
        if session in self._waiting:
            self._waiting.remove(session)
        self._live.pop(session.session_id, None)
        self._idle.pop(session.session_id, None)

    def expire(self) -> None:
        """Drops kept sessions that were idle for too long."""
        oldest_allowed = time.monotonic() - self._limits.session_ttl_s
        for session in list(self._idle.values()):
            if session.clock.last_token < oldest_allowed and session not in self._waiting:
                del self._idle[session.session_id]

    def next_expiry_s(self) -> float | None:
        """Seconds until ``expire`` has something to do; None if never."""
        idle = [s.clock.last_token for s in self._idle.values() if s.state is State.IDLE]
        if not idle:
            return None
        left = min(idle) + self._limits.session_ttl_s - time.monotonic()
        return min(max(0.0, left), _LONGEST_WAIT_S)

    def _evictable(self, but: Session) -> list[Session]:
        waiting = {session.session_id for session in self._waiting}
        return [
            s
            for s in self._idle.values()
            if s.session_id != but.session_id and s.session_id not in waiting
        ]

    def _fits(self, session: Session, bytes_needed: int) -> bool:
        freeable = sum(s.reserved_bytes for s in self._evictable(session))
        taken = self.reserved_bytes - freeable - session.reserved_bytes
        return (
            len(self._live) < self._limits.max_sessions
            and taken + bytes_needed <= self._limits.session_bytes
        )

    def _make_room(self, session: Session) -> None:
        for idle in self._evictable(session):
            taken = self.reserved_bytes - session.reserved_bytes
            if taken + session.needed_bytes <= self._limits.session_bytes:
                return
            del self._idle[idle.session_id]

    def _note_turn(self, session: Session) -> None:
        turn_s = time.monotonic() - session.clock.admitted
        self._turn_s += 0.2 * (turn_s - self._turn_s)
