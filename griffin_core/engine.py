"""The engine: one thread that owns the model, the sessions and the device.

It serves both phases. Prefills run a chunk at a time and sessions a token at a time, in turns, so
neither starves the other. Commands come in from any thread by a queue; results go out through
sinks. It knows nothing of sockets, protocols or event loops.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from griffin_core.decode.events import Admitted, Event, Failed, PruningFigures, Sink
from griffin_core.decode.generation import Generation
from griffin_core.decode.intake import Intake
from griffin_core.decode.scheduler import Limits, Scheduler
from griffin_core.decode.scoring import Scoring
from griffin_core.decode.session import Session, State, Work
from griffin_core.decode.task import GenerateTask, ScoreTask
from griffin_core.errors import (
    CapacityExhausted,
    EngineFault,
    EngineStopped,
    GriffinError,
    InvalidRequest,
    SessionBusy,
    SessionClosed,
    SessionNotFound,
)
from griffin_core.experts.selection import Selection
from griffin_core.kv_cache import kv_bytes
from griffin_core.model.load import Model
from griffin_core.prefill import PrefillEvent, PrefillFinished, prefill
from griffin_core.slim.base import SlimForm
from griffin_core.slim.packed import Packed

log = logging.getLogger(__name__)

T = TypeVar("T")

_STOPPING = "the server is shutting down"

MAX_BEGUN_PREFILLS = 4
"""Prefills under way at once, each with a KV cache. More than one, so that a reader that lags holds
up nobody else; few, because no session's reservation covers them."""


@dataclass(frozen=True, kw_only=True)
class PrefillTask:
    """A prompt to run for a Decode engine, here or elsewhere.

    Args:
        token_ids: at least one id.
    """

    token_ids: tuple[int, ...]
    selection: Selection


@dataclass(frozen=True, kw_only=True)
class PrefillBegun:
    """The model is this prefill's now.

    Args:
        queue_s: seconds it waited.
    """

    queue_s: float


PrefillStreamEvent = PrefillBegun | PrefillEvent | Failed


class PrefillRun:
    """A prefill in the engine. ``cancel`` may be called from any thread; no event follows the one
    being made."""

    def __init__(
        self, events: Callable[[], Iterator[PrefillEvent | None]], sink: Sink[PrefillStreamEvent]
    ) -> None:
        self._make_events = events
        self._events: Iterator[PrefillEvent | None] | None = None
        self._arrived = time.monotonic()
        self.sink = sink
        self.cancelled = False

    @property
    def begun(self) -> bool:
        """Whether it holds a KV cache of its own."""
        return self._events is not None

    def cancel(self) -> None:
        self.cancelled = True

    def turn(self) -> bool:
        """Runs to the end of a chunk, or until the sink is full. True when there is no more."""
        if self._events is None:
            self.sink.put(PrefillBegun(queue_s=time.monotonic() - self._arrived))
            self._events = self._make_events()
        for event in self._events:
            if self.cancelled:
                return True
            if event is None:
                return False
            self.sink.put(event)
            if isinstance(event, PrefillFinished):
                return True
            if not self.sink.ready():
                return False
        return True


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """A session as others may see it."""

    session_id: str
    state: State
    context_tokens: int
    generated_tokens: int
    age_s: float
    idle_s: float
    reserved_bytes: int
    pruning: PruningFigures


class Engine:
    """Runs sessions and prefills for one model. All public methods may be called from any thread.

    Args:
        model: what to run.
        limits: what it may hold.
        selection: density and policy of requests that name none.
        slim: how sessions run on their experts.
    """

    def __init__(
        self,
        model: Model,
        *,
        limits: Limits | None = None,
        selection: Selection | None = None,
        slim: SlimForm | None = None,
    ) -> None:
        self.model = model
        self.limits = limits or Limits()
        self.selection = selection or Selection(density=1.0)
        self._slim = slim or Packed()
        self._scheduler = Scheduler(self.limits)
        # By the id of the turn, so that no turn of a session reaches into another.
        self._turns: dict[str, Session] = {}
        self._intakes: dict[str, Intake] = {}
        self._own_prefills: dict[str, PrefillRun] = {}
        self._prefills: deque[PrefillRun] = deque()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.ended: Future[None] = Future()
        """Done when the thread has ended; with its exception if a bug ended it."""
        self._stopping = False
        self._stop_lock = threading.Lock()  # so that no command slips in behind the last one
        self._thread = threading.Thread(target=self._run, name="griffin-engine", daemon=True)

    # -- from any thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends everything that is running with EngineStopped, and the thread."""
        with self._stop_lock:
            self._stopping = True
            self._commands.put(lambda: None)
        self._thread.join()

    def submit(self, task: GenerateTask | ScoreTask, sink: Sink[Event]) -> str:
        """Queues a task; what becomes of it goes to ``sink``, ending in Finished, Scored or Failed.

        On ``Admitted`` with a handoff, the caller has the prompt prefilled and passes the events to
        ``intake``. Whoever submits also calls ``cancel`` if it stops listening.

        Returns:
            The turn's id, for ``intake``, ``fail`` and ``cancel``. All three are without effect
            once the turn is over.
        """
        self._post(partial(self._submit, task, sink), partial(_refuse, sink))
        return task.turn_id

    def intake(self, turn_id: str, event: PrefillEvent) -> None:
        """Hands a turn an event of its prefill."""
        self._post(partial(self._with_turn, turn_id, partial(self._intake, event=event)))

    def fail(self, turn_id: str, error: Exception) -> None:
        """Ends a turn, and its session with it, with an error."""
        self._post(partial(self._with_turn, turn_id, partial(self._fail, error=error)))

    def cancel(self, turn_id: str) -> None:
        """Ends a turn whose caller has gone, and its session with it."""
        if run := self._own_prefills.get(turn_id):
            run.cancel()
        self._post(partial(self._with_turn, turn_id, self._forget))

    def close(self, session_id: str) -> Future[None]:
        """Frees a session in any state. The future raises SessionNotFound if there is none."""
        return self._ask(partial(self._close, session_id))

    def sessions(self) -> Future[list[SessionInfo]]:
        """All sessions, oldest first."""
        return self._ask(lambda: [self._info(session) for session in self._scheduler])

    def prefill(
        self, task: PrefillTask, sink: Sink[PrefillStreamEvent], *, admitted: bool = False
    ) -> PrefillRun:
        """Queues a prefill. Events go to ``sink`` up to PrefillFinished or Failed.

        Args:
            admitted: it is for a session that this engine has admitted, so that the queue's limit
                was applied already.
        """
        events = partial(
            prefill,
            self.model.decoder,
            task.token_ids,
            task.selection,
            chunk_tokens=self.limits.chunk_tokens,
        )
        run = PrefillRun(events, sink)
        self._post(partial(self._queue_prefill, run, admitted), partial(_refuse, sink))
        return run

    def wake(self) -> None:
        """Makes the engine look again: a sink is ready, or a flag was set."""
        self._commands.put(lambda: None)

    def _post(
        self,
        command: Callable[[], None],
        refused: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        with self._stop_lock:
            if not self._stopping:
                self._commands.put(command)
                return
        refused(EngineStopped(_STOPPING))

    def _ask(self, question: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():  # whoever asked has gone
                return
            try:
                future.set_result(question())
            except Exception as error:
                future.set_exception(error)

        self._post(answer, future.set_exception)
        return future

    # -- in the engine's thread ------------------------------------------------------------------

    def _run(self) -> None:
        fault: Exception | None = None
        with torch.inference_mode():
            try:
                while not self._stopping:
                    self._turn()
            except Exception as error:  # a bug must not leave callers waiting
                log.exception("the engine's thread ends")
                fault = error
            with self._stop_lock:
                self._stopping = True
            self._end_everything()
        if fault is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(fault)

    def _turn(self) -> None:
        """A chunk of one prefill, a token of every session, and what has become due meanwhile."""
        self._scheduler.expire()
        self._admit()
        self._take_commands(wait=not self._has_work())
        self._prefill_turn()
        for session in self._decoding():
            self._take_commands(wait=False)
            if self._scheduler.find(session.session_id) is session:  # not cancelled meanwhile
                self._guarded(session, self._decode_turn)

    def _admit(self) -> None:
        for session in self._scheduler.admit():
            self._guarded(session, self._begin_prefill)
        while stuck := self._scheduler.deadlocked():
            words = "memory: the kept session gave way while its next turn waited for room"
            self._fail(stuck, error=CapacityExhausted(words, retry_after_s=None))
            self._admit()

    def _take_commands(self, *, wait: bool) -> None:
        try:
            if wait:
                self._run_command(self._commands.get(timeout=self._scheduler.next_expiry_s()))
            while True:
                self._run_command(self._commands.get_nowait())
        except queue.Empty:
            return

    def _run_command(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:  # a bug, and one caller's; the others go on
            log.exception("command failed")

    def _has_work(self) -> bool:
        cancelled = any(run.cancelled for run in self._prefills)
        return (
            cancelled or any(run.sink.ready() for run in self._may_run()) or bool(self._decoding())
        )

    def _may_run(self) -> list[PrefillRun]:
        """Prefills in order of arrival, but no new one while MAX_BEGUN_PREFILLS hold a cache."""
        begun = [run for run in self._prefills if run.begun]
        return begun if len(begun) >= MAX_BEGUN_PREFILLS else list(self._prefills)

    def _decoding(self) -> list[Session]:
        """Sessions whose turn it is. One whose reader lags is left out until it has caught up."""
        return [s for s in self._scheduler.live if s.state is State.DECODE and s.sink.ready()]

    def _guarded(self, session: Session, action: Callable[[Session], None]) -> None:
        """Whatever goes wrong in a session's turn ends that session alone."""
        try:
            action(session)
        except GriffinError as error:
            self._fail(session, error=error)
        except Exception as error:
            log.exception("session %s failed", session.session_id)
            self._fail(session, error=EngineFault(f"{type(error).__name__}: {error}"))

    def _with_turn(self, turn_id: str, action: Callable[[Session], None]) -> None:
        if session := self._turns.get(turn_id):
            self._guarded(session, action)

    def _submit(self, task: GenerateTask | ScoreTask, sink: Sink[Event]) -> None:
        try:
            session = self._session_for(task)
            self._begin_turn(session, task, sink)
            self._turns[task.turn_id] = session
            self._admit()  # now, so that the next in line does not find the queue full
        except Exception as error:
            if not isinstance(error, GriffinError):
                log.exception("task refused")
                error = EngineFault(f"{type(error).__name__}: {error}")
            sink.put(Failed(error=error))

    def _session_for(self, task: GenerateTask | ScoreTask) -> Session:
        if isinstance(task, ScoreTask) or task.continues is None:
            return Session(task.turn_id)
        kept = self._scheduler.find(task.continues)
        if kept is None:
            raise SessionNotFound(task.continues)
        if kept.state is not State.IDLE:
            raise SessionBusy(task.continues)
        return kept

    def _begin_turn(
        self, session: Session, task: GenerateTask | ScoreTask, sink: Sink[Event]
    ) -> None:
        decoder = self.model.decoder
        spec = decoder.spec
        work: Work
        keep = False
        if isinstance(task, ScoreTask):
            selection = task.pruning.selection(self.selection, task.seed)
            more = len(task.continuation)
            work = Scoring(decoder, task)
        else:
            base = session.selection if session.tokens else self.selection
            selection = task.pruning.selection(base, task.sampling.seed)
            more = task.stopping.max_tokens
            work = Generation(self.model, task)
            keep = task.keep
        length = len(session.tokens) + len(task.prompt)
        if length >= spec.context_length:
            raise InvalidRequest(
                "session_id",
                f"{length} tokens with the turns before",
                f"at most {spec.context_length - 1}, one less than the context length",
            )
        capacity = min(length + more, spec.context_length)
        k = selection.experts_of(spec.ff_width)
        slim_bytes = sum(self._slim.planned_bytes(layer.ff, k) for layer in decoder.layers)
        held = session.cache.capacity if session.cache else 0  # a cache never shrinks
        needed = kv_bytes(spec, decoder.dtype, max(capacity, held)) + slim_bytes
        self._scheduler.enqueue(session, needed)
        session.begin_turn(
            task.turn_id,
            arrived=task.arrived,
            prompt=task.prompt,
            capacity=capacity,
            selection=selection,
            work=work,
            sink=sink,
            keep=keep,
        )

    def _begin_prefill(self, session: Session) -> None:
        decoder = self.model.decoder
        later_turn = session.cache is not None
        if session.cache is None:
            cache = decoder.new_cache(session.capacity)
        else:
            cache = session.cache
            cache.grow(session.capacity)
        self._intakes[session.turn_id] = Intake(
            decoder,
            self._slim,
            None if later_turn else cache,
            tokens=session.prompt_tokens,
            experts_per_layer=session.selection.experts_of(decoder.spec.ff_width),
        )
        if later_turn:
            # The slim view of the turn before is of no use now; its bytes are the next one's.
            session.view = None
            events = partial(
                prefill,
                decoder,
                session.tokens[session.turn_start :],
                session.selection,
                cache=cache,
                s2=session.s2,
                chunk_tokens=self.limits.chunk_tokens,
            )
            run = PrefillRun(events, _OwnIntake(self, session))
            self._own_prefills[session.turn_id] = run
            self._prefills.append(run)
        session.sink.put(Admitted(handoff=None if later_turn else session.selection))

    def _intake(self, session: Session, *, event: PrefillEvent) -> None:
        intake = self._intakes.get(session.turn_id)
        if intake is None:
            return
        if not isinstance(event, PrefillFinished):
            intake.take(event)
            return
        intake.finish(session)
        del self._intakes[session.turn_id]
        self._own_prefills.pop(session.turn_id, None)
        session.clock.prefilled = time.monotonic()
        session.clock.selection_s = event.selection_s
        session.clock.slim_build_s = intake.slim_build_s
        session.state = State.DECODE
        session.work.begin(session, event.last_hidden)

    def _decode_turn(self, session: Session) -> None:
        if not session.work.step(session):
            return
        if session.keep:
            del self._turns[session.turn_id]
            self._scheduler.keep(session)
        else:
            self._forget(session)

    def _queue_prefill(self, run: PrefillRun, admitted: bool) -> None:
        if not admitted and len(self._prefills) > self.limits.max_queue:  # one runs, others wait
            error = CapacityExhausted(
                f"queue: {len(self._prefills)} prefills wait already, the most this server allows",
                retry_after_s=self._scheduler.retry_after_s,
            )
            run.sink.put(Failed(error=error))
        else:
            self._prefills.append(run)

    def _prefill_turn(self) -> None:
        """One chunk of the first prefill whose reader keeps up."""
        for cancelled in [run for run in self._prefills if run.cancelled]:
            self._prefills.remove(cancelled)
        run = next((run for run in self._may_run() if run.sink.ready()), None)
        if run is None:
            return
        try:
            done = run.turn()
        except Exception as error:
            log.exception("prefill failed")
            run.sink.put(Failed(error=EngineFault(f"{type(error).__name__}: {error}")))
            done = True
        if done:
            self._prefills.remove(run)

    def _close(self, session_id: str) -> None:
        session = self._scheduler.find(session_id)
        if session is None:
            raise SessionNotFound(session_id)
        if session.state is State.IDLE:
            self._forget(session)
        else:
            self._fail(session, error=SessionClosed(f"session {session_id!r} was closed"))

    def _fail(self, session: Session, *, error: Exception) -> None:
        session.sink.put(Failed(error=error))
        self._forget(session)

    def _forget(self, session: Session) -> None:
        """The one place where a session's memory goes."""
        self._turns.pop(session.turn_id, None)
        self._intakes.pop(session.turn_id, None)
        if run := self._own_prefills.pop(session.turn_id, None):
            run.cancel()
        self._scheduler.drop(session)

    def _end_everything(self) -> None:
        stopped = EngineStopped(_STOPPING)
        self._take_commands(wait=False)
        for session in list(self._scheduler):
            if session.state is State.IDLE:
                self._forget(session)
            else:
                self._fail(session, error=stopped)
        for run in self._prefills:
            run.sink.put(Failed(error=stopped))
        self._prefills.clear()

    def _info(self, session: Session) -> SessionInfo:
        now = time.monotonic()
        idle = session.state is State.IDLE
        return SessionInfo(
            session_id=session.session_id,
            state=session.state,
            context_tokens=len(session.tokens),
            generated_tokens=session.generated_tokens,
            age_s=now - session.opened,
            idle_s=now - session.clock.last_token if idle else 0.0,
            reserved_bytes=session.reserved_bytes,
            pruning=session.figures(self.model.decoder.spec.ff_width),
        )


def _refuse(sink: Sink[Failed], error: Exception) -> None:
    sink.put(Failed(error=error))


class _OwnIntake:
    """The sink of a prefill that the engine runs for a session of its own."""

    def __init__(self, engine: Engine, session: Session) -> None:
        self._engine = engine
        self._session = session

    def put(self, event: PrefillStreamEvent) -> None:
        if isinstance(event, Failed):
            self._engine._fail(self._session, error=event.error)
        elif not isinstance(event, PrefillBegun):
            self._engine._guarded(self._session, partial(self._engine._intake, event=event))

    def ready(self) -> bool:
        return True
