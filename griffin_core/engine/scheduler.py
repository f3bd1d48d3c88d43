"""Who may enter: sessions wait in order of arrival until count and bytes allow them in."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from griffin_core.engine.sessions import Reservation, Session, State
from griffin_core.engine.snapshot import SchedulerSnapshot
from griffin_core.errors import CapacityExhausted
from griffin_core.forward.prefill import CHUNK_TOKENS
from griffin_core.kv.budget import Budget

IDLE_SHARE = 0.25
"""Of the sessions' memory, for those that are kept between turns, unless a limit is set."""

_REMEMBERED = 1024  # kept sessions whose end can still be explained


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine may hold, and for how long.

    Args:
        max_sessions: sessions in prefill or decode at once.
        max_queue: sessions, and prefills for other servers, that may wait.
        session_bytes: KV caches and slim views of all sessions together; None for
            ``memory_fraction`` of what the device has free once the engine is prepared; 0 for an
            engine that only prefills for others.
        idle_bytes: the share of it that kept sessions between turns may hold; None for
            ``IDLE_SHARE`` of it.
        memory_fraction: in (0, 1]; None for the device's default (``device_memory.FRACTIONS``).
        session_ttl_s: how long a kept session may be idle.
        reader_timeout_s: how long a session waits for a client that does not read.
        chunk_tokens: prompt tokens prefilled between two decode steps.
        prefill_share: share of the time that prefills get while sessions decode, in (0, 1].
    """

    max_sessions: int = 64
    max_queue: int = 256
    session_bytes: int | None = None
    idle_bytes: int | None = None
    memory_fraction: float | None = None
    session_ttl_s: float = 600.0
    reader_timeout_s: float = 60.0
    chunk_tokens: int = CHUNK_TOKENS
    prefill_share: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (
            ("max_sessions", 1),
            ("max_queue", 0),
            ("session_bytes", 0),
            ("idle_bytes", 0),
            ("session_ttl_s", 0),
            ("reader_timeout_s", 0),
            ("chunk_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name}: got {value}; allowed: >= {least}")
        for name in ("prefill_share", "memory_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: got {value}; allowed: (0, 1]")

    def idle_bytes_of(self, session_bytes: int) -> int:
        """Bytes that kept sessions may hold, of a budget of so many."""
        if self.idle_bytes is None:
            return int(session_bytes * IDLE_SHARE)
        return min(self.idle_bytes, session_bytes)


class Kept:
    """Sessions kept between their turns, and their bytes as a running sum: an engine may keep tens
    of thousands."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # oldest first
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session: Session) -> bool:
        return session.session_id in self._sessions

    @property
    def session_ids(self) -> tuple[str, ...]:
        """The ids of all of them, in the order in which they were added."""
        return tuple(self._sessions)

    @property
    def oldest(self) -> Session | None:
        """The session that was added first of those that are left."""
        return next(iter(self._sessions.values()), None)

    def add(self, session: Session) -> None:
        """Adds a session that holds its cache's bytes and no others, as the newest."""
        self._sessions[session.session_id] = session
        self.nbytes += session.reservation.kv

    def discard(self, session: Session) -> None:
        """Removes a session. Without effect if it is not there."""
        if self._sessions.pop(session.session_id, None) is not None:
            self.nbytes -= session.reservation.kv


class Scheduler:
    """Every session there is, and the bytes they have reserved. Owned by the engine's thread.

    A session reserves the most it can come to need when it is admitted, so one that has begun never
    runs out (docs/adr/0007). Idle sessions give way to new ones, the longest idle first. No method
    but ``__iter__`` and ``snapshot`` takes longer the more idle sessions there are.

    Args:
        budget: says how many bytes there are.
        free: called with each kept session that has to go, and why.
    """

    def __init__(self, limits: Limits, budget: Budget, free: Callable[[Session], None]) -> None:
        self._limits = limits
        self._budget = budget
        self._free = free
        self._numbers = count(1)
        self._sessions: dict[str, Session] = {}
        self._opened: list[Session] = []  # all sessions, by number
        self._waiting: dict[str, Session] = {}  # in order of arrival
        self._needs: dict[str, Reservation] = {}  # of those that wait
        self._live: dict[str, Session] = {}
        self._idle = Kept()  # longest idle first
        self._recalled = Kept()  # kept ones whose next turn waits: as good as live
        self._gone: OrderedDict[str, str] = OrderedDict()  # session id -> why
        self._turn_s: float | None = None  # smoothed, of turns that came to their end

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        """All sessions, oldest first."""
        return iter(list(self._opened))

    def page(self, after: int, most: int) -> list[Session]:
        """Up to ``most`` sessions, oldest first, of those with a number above ``after``."""
        first = bisect_right(self._opened, after, key=_number)
        return self._opened[first : first + most]

    def states(self) -> Counter[State]:
        """How many sessions are in each state."""
        states = Counter(session.state for session in self._live.values())
        states[State.QUEUED] = len(self._waiting)
        states[State.IDLE] = len(self._idle)
        return states

    def snapshot(self) -> SchedulerSnapshot:
        """Which sessions run, wait and rest now. It takes longer the more sessions there are."""
        return SchedulerSnapshot(
            live=tuple(self._live),
            waiting=tuple(self._waiting),
            idle=self._idle.session_ids,
            recalled=self._recalled.session_ids,
            idle_bytes=self._idle.nbytes,
            recalled_bytes=self._recalled.nbytes,
            turn_s=self._turn_s,
        )

    def find(self, session_id: str) -> Session | None:
        """A session, wherever it is."""
        return self._sessions.get(session_id)

    def why_gone(self, session_id: str) -> str:
        """What became of a session that is not there."""
        return self._gone.get(session_id, "it never was, or ended long ago")

    @property
    def live(self) -> list[Session]:
        """Sessions in prefill or decode."""
        return list(self._live.values())

    def enqueue(self, session: Session, needs: Reservation, deadline: float | None) -> None:
        """Puts a new session, or an idle one with a new turn, at the end of the queue.

        Args:
            needs: the most it will hold, what it holds now included.
            deadline: on ``time.monotonic``; who cannot begin before it is refused now.

        Raises:
            CapacityExhausted: the queue is full or too slow, or the session alone is over the
                limit.
        """
        alone = needs.kv + needs.zeroed + needs.view
        if alone > self._budget.limit:
            raise CapacityExhausted(
                f"memory: the request needs {alone} bytes of KV cache and slim "
                f"view; the server allows {self._budget.limit} in all. Ask for fewer "
                "tokens",
                retry_after_s=None,
            )
        begins_now = not self._waiting and self._fits(session, needs)
        if not begins_now:
            if len(self._waiting) >= self._limits.max_queue:
                raise CapacityExhausted(
                    f"queue: {len(self._waiting)} requests wait already, the most this server "
                    "allows",
                    retry_after_s=self.retry_after_s,
                )
            wait_s, now = self.expected_wait_s, time.monotonic()
            # One that has passed is no matter of room: the caller's own clock ends the call.
            if deadline is not None and now < deadline < now + wait_s:
                raise CapacityExhausted(
                    f"queue: with {len(self._waiting)} requests ahead it would begin in about "
                    f"{wait_s:.1f} s, after its deadline",
                    retry_after_s=max(wait_s, self.retry_after_s),
                )
        if session in self._idle:
            self._idle.discard(session)
            self._recalled.add(session)
        elif session.session_id not in self._sessions:
            session.number = next(self._numbers)
            self._sessions[session.session_id] = session
            self._opened.append(session)
        self._needs[session.session_id] = needs
        session.state = State.QUEUED
        self._waiting[session.session_id] = session

    @property
    def retry_after_s(self) -> float:
        """When a place is likely to be free."""
        turn_s = 1.0 if self._turn_s is None else self._turn_s
        return max(0.1, turn_s / max(1, len(self._live)))

    @property
    def expected_wait_s(self) -> float:
        """How long the next in the queue is likely to wait: the usual length of a turn, shared by
        the sessions that run at once, for each one ahead and itself. 0 while no turn has shown its
        length."""
        if self._turn_s is None:
            return 0.0
        return (len(self._waiting) + 1) * self._turn_s / max(1, len(self._live))

    def admit(self) -> list[Session]:
        """Sessions that may begin now, in order of arrival. None overtakes, unless nothing runs
        that the first in line could wait for."""
        admitted = []
        while session := self._next():
            del self._waiting[session.session_id]
            self._make_room(session)
            self._recalled.discard(session)
            session.reservation = self._needs.pop(session.session_id)
            session.state = State.PREFILL
            session.clock.admitted = time.monotonic()
            self._live[session.session_id] = session
            admitted.append(session)
        return admitted

    def _next(self) -> Session | None:
        may_overtake = not self._live
        for session in self._waiting.values():
            if self._fits(session, self._needs[session.session_id]):
                return session
            if not may_overtake:
                return None
        return None

    def deadlocked(self) -> Session | None:
        """The youngest kept session whose next turn waits, if nothing runs and nobody in the queue
        fits: what it holds must go."""
        if self._live or not self._waiting or self._next():
            return None
        return next((s for s in reversed(self._waiting.values()) if s in self._recalled), None)

    def keep(self, session: Session, held_bytes: int) -> None:
        """A live session's turn is over; it stays for the next, with the bytes it still holds."""
        self._note_turn(session)
        del self._live[session.session_id]
        session.state = State.IDLE
        session.reservation = Reservation(kv=held_bytes)
        self._idle.add(session)
        while len(self._idle) > 1 and self._idle.nbytes > self._budget.idle_limit:
            self._evict_oldest("it gave way to sessions kept later (--idle-memory-gib)")

    def drop(self, session: Session, why: str) -> None:
        """Forgets a session, wherever it is."""
        if session.session_id in self._live and session.clock.prefilled:
            self._note_turn(session)
        if self._sessions.pop(session.session_id, None) is not None:
            del self._opened[bisect_left(self._opened, session.number, key=_number)]
        self._waiting.pop(session.session_id, None)
        self._needs.pop(session.session_id, None)
        self._live.pop(session.session_id, None)
        self._idle.discard(session)
        self._recalled.discard(session)
        self._gone[session.session_id] = why
        while len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)

    def expire(self) -> None:
        """Drops kept sessions that were idle for too long."""
        while self.next_expiry_s() == 0:
            self._evict_oldest(f"it was idle for {self._limits.session_ttl_s:g} s")

    def next_expiry_s(self) -> float | None:
        """Seconds until ``expire`` has something to do; None if never. All may be idle for equally
        long, so the longest idle expires first."""
        oldest = self._idle.oldest
        if oldest is None:
            return None
        return max(0.0, oldest.clock.last_token + self._limits.session_ttl_s - time.monotonic())

    def _evict_oldest(self, why: str) -> None:
        session = self._idle.oldest
        assert session is not None
        self.drop(session, why)
        self._free(session)

    def _fits(self, session: Session, needs: Reservation) -> bool:
        """Whether there is room once every idle session has gone."""
        if len(self._live) >= self._limits.max_sessions:
            return False
        return self._total(session, needs) <= self._budget.limit

    def _make_room(self, session: Session) -> None:
        room = self._budget.limit - self._total(session, self._needs[session.session_id])
        while len(self._idle) and self._idle.nbytes > room:
            self._evict_oldest("it gave way to requests that needed its memory")

    def _total(self, session: Session, needs: Reservation) -> int:
        """Bytes that the live sessions and those whose next turn waits can come to hold, with one
        session's next turn among them. What that one holds now is in its needs."""
        everyone = [*(s.reservation for s in self._live.values()), needs]
        total = sum(r.kv + r.zeroed + (0 if r.pool else r.view) for r in everyone)
        sharing = Counter((r.pool, r.view) for r in everyone if r.pool)
        for (pool, view), sessions in sharing.items():
            total += min(sessions, pool.most_views) * view
        own = session.reservation.kv if session in self._recalled else 0
        return total + self._recalled.nbytes - own

    def _note_turn(self, session: Session) -> None:
        turn_s = time.monotonic() - session.clock.admitted
        before = turn_s if self._turn_s is None else self._turn_s
        self._turn_s = before + 0.2 * (turn_s - before)


def _number(session: Session) -> int:
    return session.number
