"""Sessions and their turns: a turn is begun, and ended in one of many ways; a session is kept or
freed.

``admission`` says what comes before a turn's first token, ``token_steps`` and ``score_steps`` what
comes after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

from griffin_core.engine.events import Event, Failed, Finished, Scored
from griffin_core.engine.expert_groups import ExpertGroups
from griffin_core.engine.limits import Limits
from griffin_core.engine.memory import SessionMemory
from griffin_core.engine.ports import Sink
from griffin_core.engine.sampler_slots import SamplerSlots
from griffin_core.engine.scheduler import Scheduler
from griffin_core.engine.session import Session, State
from griffin_core.engine.session_prefills import SessionPrefills
from griffin_core.engine.session_table import SessionTable
from griffin_core.engine.turn import TurnPlan
from griffin_core.errors import EngineFault, GriffinError, SessionClosed

log = logging.getLogger(__name__)


class Sessions:
    """The sessions of an engine. Owned by the engine's thread.

    An error in one session's turn ends that session and no other.

    Args:
        memory: where their caches lie.
        prefills: how their prompts are read.
        groups: what they run on.
        slots: of the sampler.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        memory: SessionMemory,
        prefills: SessionPrefills,
        groups: ExpertGroups,
        slots: SamplerSlots,
    ) -> None:
        self.table = SessionTable()
        self.scheduler = Scheduler(limits, self.table, memory.budget, self.free, self.fail)
        self._memory = memory
        self._prefills = prefills
        self._groups = groups
        self._slots = slots
        self._by_turn: dict[str, Session] = {}

    def begin(self, session: Session, plan: TurnPlan, sink: Sink[Event]) -> None:
        """Queues a session's turn.

        Args:
            sink: gets the turn's events.

        Raises:
            CapacityExhausted: the queue refuses it; then nothing has changed.
        """
        self.scheduler.enqueue(session, plan.needs, plan.deadline)
        session.begin_turn(plan, sink)
        self._by_turn[plan.turn_id] = session

    @property
    def turns(self) -> Mapping[str, Session]:
        """The sessions of all turns that have not ended, by the id of the turn."""
        return MappingProxyType(self._by_turn)

    def is_live(self, turn_id: str, session: Session) -> bool:
        """Whether a session is still in this turn. It may even be in its next one."""
        return self._by_turn.get(turn_id) is session

    def join(self, session: Session) -> None:
        """Lets a session run tokens from the next step on."""
        self._groups.join(session)
        self.scheduler.idles = False  # the session may need less now

    def rejoin(self, session: Session) -> None:
        """Lets a session that runs tokens run on other experts from the next step on."""
        self._groups.leave(session)
        self.join(session)

    def finish(self, session: Session, last: Finished | Scored) -> None:
        """Ends a turn: its session is kept or freed, and then its sink gets the last event. In that
        order, since a session that cannot be kept has failed, and a sink gets one last event."""
        if not session.keep:
            self._forget(session, "it was not kept")
            session.sink.put(last)
            return
        assert session.cache is not None
        self._end_turn(session)
        session.in_flight = 0  # one step too many may be running: nothing of it counts
        self._memory.resize(session.cache, session.cache.length)
        self.scheduler.keep(session, self._memory.kept_bytes(session.cache.length))
        session.sink.put(last)
        session.end_turn()

    def fail(self, session: Session, error: Exception) -> None:
        """Ends a turn, and its session with it, with an error."""
        session.turn.flush(session)
        session.sink.put(Failed(error=error))
        self._forget(session, f"its last turn failed: {error}")

    def fail_with(self, session: Session, error: Exception) -> None:
        """As ``fail``, with an error that may be a bug: it is logged then."""
        if not isinstance(error, GriffinError):
            log.error("session %s failed", session.session_id, exc_info=error)
            error = EngineFault.of(error)
        self.fail(session, error)

    def guard(self, session: Session, action: Callable[[Session], None]) -> None:
        """Does something in a session's turn. Whatever goes wrong ends that session alone."""
        try:
            action(session)
        except Exception as error:
            self.fail_with(session, error)

    def cancel(self, turn_id: str) -> None:
        """Ends a turn whose caller has gone, and its session with it. Without effect if the turn is
        over."""
        if session := self._by_turn.get(turn_id):
            self.guard(session, lambda session: self._forget(session, "its caller went away"))

    def close(self, session_id: str, owner: str | None = None) -> None:
        """Frees a session in any state.

        Args:
            owner: whose it must be; None for anybody's.

        Raises:
            SessionNotFound: there is none.
        """
        session = self.table.find(session_id, owner)
        if session.state is State.IDLE:
            self._forget(session, "it was closed")
        else:
            self.fail(session, SessionClosed(f"session {session_id!r} was closed"))

    def close_all(self, error: Exception) -> None:
        """Frees everything. Turns that have not ended fail with an error, even if memory can no
        longer be freed because the device is lost."""
        for session in self.table:
            try:
                if session.state is State.IDLE:
                    self._forget(session, str(error))
                else:
                    self.fail(session, error)
            except Exception:
                log.exception("session %s could not be freed", session.session_id)

    def _forget(self, session: Session, reason: str) -> None:
        self.scheduler.drop(session, reason)
        self.free(session)

    def free(self, session: Session) -> None:
        """The one place where a session's memory goes."""
        self._end_turn(session)
        self._memory.free(session)

    def _end_turn(self, session: Session) -> None:
        self._by_turn.pop(session.turn_id, None)
        self._prefills.end(session.turn_id)
        self._groups.leave(session)
        self._slots.release(session)
