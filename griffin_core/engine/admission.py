"""From a task to a session whose prompt has been read: queued, admitted, prefilled."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from torch import Tensor

from griffin_core.engine.events import Admitted, Event, Failed, Started
from griffin_core.engine.generation import Generation
from griffin_core.engine.memory import SessionMemory
from griffin_core.engine.ports import Observer, Sink
from griffin_core.engine.sampler_slots import SamplerSlots
from griffin_core.engine.scoring import Scoring
from griffin_core.engine.session import Session, State
from griffin_core.engine.session_prefills import SessionPrefills
from griffin_core.engine.sessions import Sessions
from griffin_core.engine.task import GenerateTask, ScoreTask
from griffin_core.engine.turn_planner import TurnPlanner
from griffin_core.errors import CapacityExhausted, EngineFault, GriffinError, SessionBusy
from griffin_core.forward.events import (
    PrefillEvent,
    PrefillFinished,
    PrefillRestarted,
)
from griffin_core.model.decoder import Decoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PromptRead:
    """A generation whose prompt has been read and that has no token yet.

    Args:
        hidden: [D], what the head reads for the first token.
    """

    turn_id: str
    session: Session
    hidden: Tensor


class Admission:
    """Takes tasks up to the point where the first token can be drawn or scored. Owned by the
    engine's thread.

    Args:
        planner: says what a task's turn is.
        memory: where caches are allocated.
        prefills: reads prompts, here or elsewhere.
        slots: of the sampler.
        observer: is told which experts prompts choose.
        share_across_owners: whether sessions of different owners may run on one expert set.
    """

    def __init__(
        self,
        decoder: Decoder,
        sessions: Sessions,
        *,
        planner: TurnPlanner,
        memory: SessionMemory,
        prefills: SessionPrefills,
        slots: SamplerSlots,
        observer: Observer,
        share_across_owners: bool,
    ) -> None:
        self._decoder = decoder
        self._share_across_owners = share_across_owners
        self._sessions = sessions
        self._planner = planner
        self._memory = memory
        self._prefills = prefills
        self._slots = slots
        self._observer = observer
        self._prompts_read: list[PromptRead] = []

    def submit(self, task: GenerateTask | ScoreTask, sink: Sink[Event]) -> None:
        """Queues a task, or tells its sink why it is refused."""
        try:
            session = self._session_for(task)
            plan = self._planner.plan(session, task)
            self._sessions.begin(session, plan, sink)
            self.admit()  # now, so that the next in line does not find the queue full
        except Exception as error:
            if not isinstance(error, GriffinError):
                log.exception("task refused")
                error = EngineFault.of(error)
            sink.put(Failed(error=error))

    def _session_for(self, task: GenerateTask | ScoreTask) -> Session:
        if isinstance(task, ScoreTask) or task.continues is None:
            shares_with = "" if self._share_across_owners else task.owner
            return Session(task.turn_id, owner=task.owner, shares_with=shares_with)
        kept = self._sessions.table.find(task.continues, task.owner)
        if kept.state is not State.IDLE:
            raise SessionBusy(task.continues)
        return kept

    def admit(self) -> None:
        """Begins the turns for which there is room."""
        for session in self._sessions.scheduler.admit():
            self._sessions.guard(session, self._begin_prefill)
        while stuck := self._sessions.scheduler.deadlocked():
            message = "memory: the kept session was evicted while its next turn waited for room"
            self._sessions.fail(stuck, CapacityExhausted(message, retry_after_s=None))
            self.admit()

    def _begin_prefill(self, session: Session) -> None:
        self._memory.allocate(session)
        queue_s = session.clock.admitted - session.clock.arrived
        session.sink.put(Admitted(queue_s=queue_s))
        self._prefills.start(session, self.receive)

    def receive(self, turn_id: str, event: PrefillEvent | Exception) -> None:
        """Takes an event of a turn's prefill, or the error that ends it. Without effect if the
        prefill or the turn is over."""
        session = self._sessions.turns.get(turn_id)
        if session is not None and self._prefills.receiver(turn_id) is not None:
            self._sessions.guard(session, lambda session: self._receive(session, event))

    def _receive(self, session: Session, event: PrefillEvent | Exception) -> None:
        receiver = self._prefills.receiver(session.turn_id)
        assert receiver is not None
        match event:
            case Exception():
                self._sessions.fail(session, event)
            case PrefillRestarted():
                self._prefills.restart(session)
            case PrefillFinished():
                receiver.finish(session)
                self._prefills.finish(session.turn_id)
                self._begin_decode(session, event)
            case _:
                receiver.receive(event)

    def _begin_decode(self, session: Session, event: PrefillFinished) -> None:
        """The handoff is whole. The first token is drawn in the next step, together with those of
        other prompts, and only then are the experts laid out that the second one needs."""
        clock = session.clock
        clock.prefilled = time.monotonic()
        clock.selection_s = event.selection_s
        session.state = State.DECODE
        session.sink.put(
            Started(
                session_id=session.session_id,
                prompt_tokens=session.prompt_tokens,
                prefill_s=clock.prefilled - clock.admitted,
                selection_s=event.selection_s,
                pruning=session.pruning_stats(self._decoder.spec),
            )
        )
        if session.slim is not None:
            self._observer.chose(session.slim)
        hidden = event.last_hidden.to(self._decoder.device, self._decoder.dtype)
        if not isinstance(session.turn, Scoring):
            read = PromptRead(turn_id=session.turn_id, session=session, hidden=hidden)
            self._prompts_read.append(read)
            return
        session.turn.begin(session, hidden)
        if session.turn.runs_tokens:
            self._sessions.join(session)

    @property
    def has_prompts_read(self) -> bool:
        """Whether a generation waits for its first token."""
        return bool(self._prompts_read)

    def take_prompts_read(self) -> list[PromptRead]:
        """The generations that wait for their first token, each with its slot of the sampler."""
        waiting, self._prompts_read = self._prompts_read, []
        live = [read for read in waiting if self._sessions.is_live(read.turn_id, read.session)]
        for read in live:
            self._sessions.guard(read.session, self._open_slot)
        return [read for read in live if self._sessions.is_live(read.turn_id, read.session)]

    def _open_slot(self, session: Session) -> None:
        assert isinstance(session.turn, Generation)
        self._slots.acquire(session, session.turn.sampling)
        session.turn.begin(session)
