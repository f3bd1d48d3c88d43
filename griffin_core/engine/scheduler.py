"""Admission control: queues in order of arrival, bounded by the number of sessions and by bytes.

A session reserves the most bytes that it can come to hold when it is admitted, so one that has
begun never runs out (docs/adr/0007). Kept sessions are evicted for new ones: the longest idle of
the owner that holds the most.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from griffin_core.engine.kept_sessions import KeptSessions
from griffin_core.engine.limits import Limits
from griffin_core.engine.reservation import Reservation, total_bytes
from griffin_core.engine.retry_times import RetryTimes
from griffin_core.engine.session import Session, State
from griffin_core.engine.session_table import SessionTable
from griffin_core.engine.snapshot import SchedulerSnapshot
from griffin_core.engine.waiting import WaitingSessions
from griffin_core.errors import CapacityExhausted
from griffin_core.kv.budget import Budget

MOST_TRIED = 8
"""How many sessions that do not fit are looked at before the queue waits."""

MOST_OVERTAKEN = 16
"""How often sessions that fit may overtake one that waits for more memory than is free."""

TURN_SMOOTHING = 0.2
"""Weight of the last turn in the smoothed length of a turn."""


class Scheduler:
    """Which sessions wait, run and rest, and the bytes they have reserved. Owned by the engine's
    thread.

    No method except ``snapshot`` takes longer the more idle sessions there are.

    Args:
        table: gets every session that is queued.
        budget: says how many bytes there are.
        free: called with each kept session that has been evicted or has expired.
        refuse: called with a session that waited and must give its place to another owner's, and
            the error; it drops the session.
    """

    def __init__(
        self,
        limits: Limits,
        table: SessionTable,
        budget: Budget,
        free: Callable[[Session], None],
        refuse: Callable[[Session, CapacityExhausted], None],
    ) -> None:
        self._limits = limits
        self._table = table
        self._budget = budget
        self._free = free
        self._refuse = refuse
        self._waiting = WaitingSessions()
        self.idles = False
        """Whether nothing that waits could begin when it was last tried. Set it to False when a
        live session has come to need less."""
        self._needs: dict[str, Reservation] = {}  # of those that wait
        self._live: dict[str, Session] = {}
        self._idle = KeptSessions()  # the longest idle first
        self._recalled = KeptSessions()  # their next turn waits, so they are not evicted
        self._retry_times = RetryTimes()
        self._turn_s: float | None = None  # smoothed length of the turns that ended well

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
            waiting=tuple(session.session_id for session in self._waiting),
            idle=self._idle.session_ids,
            recalled=self._recalled.session_ids,
            idle_bytes=self._idle.nbytes,
            recalled_bytes=self._recalled.nbytes,
            turn_s=self._turn_s,
        )

    @property
    def live(self) -> list[Session]:
        """Sessions in prefill or decode."""
        return list(self._live.values())

    def enqueue(self, session: Session, needs: Reservation, deadline: float | None) -> None:
        """Puts a new session, or an idle one with a new turn, at the end of its owner's queue. If
        the queues are full, an owner with fewer waiting sessions than another gets the place of the
        other's youngest.

        Args:
            needs: the most it will hold, what it holds now included.
            deadline: on ``time.monotonic``; a session that cannot begin before it is refused now.

        Raises:
            CapacityExhausted: the queue is full or too slow, or the session alone is over the
                limit.
        """
        if needs.alone > (most := self._limits.owner_bytes_of(self._budget.limit)):
            raise CapacityExhausted(
                f"memory: the request needs {needs.alone} bytes of KV cache and slim "
                f"view; the server allows a caller {most} in all. Ask for fewer tokens",
                retry_after_s=None,
            )
        gives_way = None
        if self._waiting.blocks(session.owner, self._capped()) or not self._fits(session, needs):
            gives_way = self._check_queue(session.owner, deadline)
        if session in self._idle:
            self._idle.discard(session)
            self._recalled.add(session)
        self._table.add(session)
        self._needs[session.session_id] = needs
        session.state = State.QUEUED
        session.overtaken = 0
        self._waiting.add(session)
        self.idles = False
        if gives_way is not None:
            message = "queue: it is full, and most of its requests are yours"
            error = CapacityExhausted(message, retry_after_s=self.retry_after_s(gives_way.owner))
            self._refuse(gives_way, error)

    def _capped(self) -> set[str]:
        """The owners that run as many sessions as they may."""
        running = Counter(session.owner for session in self._live.values())
        most = self._limits.owner_sessions
        return {owner for owner, count in running.items() if count >= most}

    def _check_queue(self, owner: str, deadline: float | None) -> Session | None:
        """Raises CapacityExhausted if the queue is full, or too slow for a deadline. Returns the
        session that must give its place, if one must."""
        gives_way = None
        own, most = self._waiting.count(owner), self._limits.max_owner_queue
        if most is not None and own >= most:
            raise CapacityExhausted(
                f"queue: {own} of your requests wait already, the most this server allows a caller",
                retry_after_s=self.retry_after_s(owner),
            )
        if len(self._waiting) >= self._limits.max_queue:
            gives_way = self._waiting.gives_way(owner, self._recalled)
            if gives_way is None:
                raise CapacityExhausted(
                    f"queue: {len(self._waiting)} requests wait already, the most this server "
                    "allows",
                    retry_after_s=self.retry_after_s(owner),
                )
        ahead, now = self._waiting.ahead_of_next(owner, self._capped()), time.monotonic()
        # For each session ahead and for itself the usual length of a turn, divided by the number of
        # sessions that run at once; 0 while no turn has shown its length.
        wait_s = (ahead + 1) * (self._turn_s or 0.0) / max(1, len(self._live))
        # A deadline that has passed says nothing about capacity: the caller's own clock ends the
        # call.
        if deadline is not None and now < deadline < now + wait_s:
            raise CapacityExhausted(
                f"queue: with {ahead} requests ahead it would begin in about "
                f"{wait_s:.1f} s, after its deadline",
                retry_after_s=max(0.1, wait_s),
            )
        return gives_way

    def retry_after_s(self, owner: str) -> float:
        """Seconds until a place is likely to be free for a request of an owner that is refused now.
        Each gets a later one."""
        turn_s = 1.0 if self._turn_s is None else self._turn_s
        return max(0.1, self._retry_times.wait_s(owner, turn_s / max(1, len(self._live))))

    def admit(self) -> list[Session]:
        """Sessions that may begin now, owner by owner and in order of arrival. One that does not
        fit is overtaken ``MOST_OVERTAKEN`` times, and more often only if nothing runs that it could
        wait for."""
        admitted = []
        while session := self._next():
            needs = self._needs[session.session_id]
            room = self._budget.limit - self._total(session, needs)
            while len(self._idle) and self._idle.nbytes > room:
                self._evict(self._idle.spared_least, "it was evicted: others needed its memory")
            self._waiting.take(session)
            del self._needs[session.session_id]
            self._recalled.discard(session)
            session.reservation = needs
            session.state = State.PREFILL
            session.clock.admitted = time.monotonic()
            self._live[session.session_id] = session
            admitted.append(session)
        return admitted

    def _next(self) -> Session | None:
        if self.idles or len(self._live) >= self._limits.max_sessions:
            return None
        passed: list[Session] = []
        capped = self._capped()
        for session in self._waiting:
            needs = self._needs[session.session_id]
            if session.owner in capped or self._over_share(session, needs):
                continue  # it waits for its owner's own sessions, and others do not wait for it
            if self._fits(session, needs):
                for other in passed:
                    other.overtaken += 1
                return session
            passed.append(session)
            if self._live and (session.overtaken >= MOST_OVERTAKEN or len(passed) == MOST_TRIED):
                break
        self.idles = True  # until something changes
        return None

    def deadlocked(self) -> Session | None:
        """If nothing runs and no session in the queue fits, the youngest kept session whose next
        turn waits: what it holds must go."""
        if self._live or not self._waiting or self._next():
            return None
        return next((s for s in reversed(list(self._waiting)) if s in self._recalled), None)

    def keep(self, session: Session, held_bytes: int) -> None:
        """A live session's turn is over; it stays for the next, with the bytes it still holds."""
        self._note_turn(session)
        self.idles = False
        del self._live[session.session_id]
        session.state = State.IDLE
        session.reservation = Reservation(kv=held_bytes)
        self._idle.add(session)
        while len(self._idle) > 1 and self._idle.nbytes > self._budget.idle_limit:
            why = "it was evicted: others were kept later (--idle-memory-gib)"
            self._evict(self._idle.spared_least, why)

    def drop(self, session: Session, reason: str) -> None:
        """Forgets a session, whatever its state."""
        self.idles = False
        if session.session_id in self._live and session.clock.prefilled:
            self._note_turn(session)
        self._table.remove(session, reason)
        self._waiting.discard(session)
        self._needs.pop(session.session_id, None)
        self._live.pop(session.session_id, None)
        self._idle.discard(session)
        self._recalled.discard(session)

    def expire(self) -> None:
        """Drops kept sessions that have been idle for too long."""
        while self.next_expiry_s() == 0:
            self._evict(self._idle.oldest, f"it was idle for {self._limits.session_ttl_s:g} s")

    def next_expiry_s(self) -> float | None:
        """Seconds until ``expire`` has something to do; None if never. All sessions may be idle
        for equally long, so the longest idle expires first."""
        oldest = self._idle.oldest
        if oldest is None:
            return None
        return max(0.0, oldest.clock.last_token + self._limits.session_ttl_s - time.monotonic())

    def _evict(self, session: Session | None, reason: str) -> None:
        assert session is not None
        self.drop(session, reason)
        self._free(session)

    def _fits(self, session: Session, needs: Reservation) -> bool:
        """Whether there is room for a session once every idle one has been evicted."""
        if len(self._live) >= self._limits.max_sessions:
            return False
        own = sum(other.owner == session.owner for other in self._live.values())
        if own >= self._limits.owner_sessions or self._over_share(session, needs):
            return False
        return self._total(session, needs) <= self._budget.limit

    def _over_share(self, session: Session, needs: Reservation) -> bool:
        """Whether its owner's running sessions and this one need more than one owner may have."""
        if self._limits.owner_share is None:
            return False
        own = [s.reservation for s in self._live.values() if s.owner == session.owner]
        return total_bytes([*own, needs]) > self._limits.owner_bytes_of(self._budget.limit)

    def _total(self, session: Session, needs: Reservation) -> int:
        """Bytes that the live sessions and those whose next turn waits can come to hold, with one
        session's next turn among them. What that session holds now is part of its needs."""
        live = total_bytes([*(s.reservation for s in self._live.values()), needs])
        own = session.reservation.kv if session in self._recalled else 0
        return live + self._recalled.nbytes - own

    def _note_turn(self, session: Session) -> None:
        turn_s = time.monotonic() - session.clock.admitted
        before = turn_s if self._turn_s is None else self._turn_s
        self._turn_s = before + TURN_SMOOTHING * (turn_s - before)
