"""All sessions of an engine, from the queue to their last token."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from griffin_core.backends.batch import StepSequence
from griffin_core.backends.transfers import on_device
from griffin_core.engine.caches import Caches
from griffin_core.engine.events import Admitted, Event, Failed, Finished, Scored, Sink, Started
from griffin_core.engine.expert_groups import ExpertGroups
from griffin_core.engine.generation import Generation, Pace
from griffin_core.engine.handoff_receiver import Intake
from griffin_core.engine.look_up import Piece, look_up, pieces_of_step
from griffin_core.engine.observer import Observer
from griffin_core.engine.prefill_queue import (
    PrefillBegun,
    PrefillQueue,
    PrefillRun,
    PrefillStreamEvent,
)
from griffin_core.engine.scheduler import Limits, Scheduler
from griffin_core.engine.scoring import Chance, Scoring, choice_bytes
from griffin_core.engine.sessions import (
    Holdings,
    Reservation,
    Session,
    SessionInfo,
    SessionPage,
    Sharing,
    State,
    Work,
)
from griffin_core.engine.snapshot import (
    BytesSnapshot,
    EngineSnapshot,
    HandoffSnapshot,
    ViewSnapshot,
    snapshot_session,
)
from griffin_core.engine.task import GenerateTask, ScoreTask
from griffin_core.errors import (
    CapacityExhausted,
    EngineFault,
    GriffinError,
    InvalidRequest,
    ReaderTooSlow,
    SessionBusy,
    SessionClosed,
    SessionNotFound,
)
from griffin_core.experts.selection import Selection
from griffin_core.forward.decode import Stepper
from griffin_core.forward.draws import Draw, DrawLost, Drawn, Draws
from griffin_core.forward.prefill import (
    LayerActivations,
    PrefillEvent,
    PrefillFinished,
    PrefillRestarted,
    Prompt,
)
from griffin_core.kv.budget import Budget
from griffin_core.kv.pool import KvPool
from griffin_core.model.load import Model
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.base import SlimForm, SlimTable
from griffin_core.slim.costs import StepCosts
from griffin_core.slim.views import SlimViews

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 3600.0
"""A queue's time-out must be finite."""

BUILD_SHARE = 0.25
"""Slim views are built between two steps for about this share of a step's time, a layer at least.
No session waits for one: it runs zeroed or dense meanwhile."""


@dataclass(frozen=True, kw_only=True)
class UnderWay:
    """Tokens that were launched and not read yet.

    Args:
        turns: of each row, by the id of its turn: a session may have ended by the time its token
            is read, and may even be in its next turn.
        densities: that each row runs on.
        draw: the tokens.
    """

    turns: Sequence[tuple[str, Session]]
    densities: Sequence[float]
    draw: Draws


class Decoding:
    """The sessions, and what each of them is doing. Owned by the engine's thread.

    Args:
        model: what to run.
        limits: what may be held.
        selection, sharing: of requests that name none.
        slims: what slim ids stand for.
        slim: how blocks on experts are built; None where ``slims`` holds the sets.
        costs: see ``slim.costs``.
        batch_invariant: see ``Engine``.
        stream_interval: see ``Pace``.
        overlap: launch a step before the tokens of the one before it are read. What a session
            makes is the same; one that has stopped by then has run a step too many, which is
            dropped.
        prefills: where prompts queue that this engine runs itself.
        own_prefill_tokens: prompts of a new session up to this many tokens are among them; None
            for all.
        observer: is told of steps and choices.
    """

    def __init__(
        self,
        model: Model,
        *,
        limits: Limits,
        selection: Selection,
        sharing: Sharing,
        slims: SlimTable,
        slim: SlimForm | None,
        costs: StepCosts,
        batch_invariant: bool,
        overlap: bool,
        prefills: PrefillQueue,
        stream_interval: int | None,
        own_prefill_tokens: int | None,
        observer: Observer,
    ) -> None:
        self._model = model
        self._decoder = model.decoder
        self._limits = limits
        self._selection = selection
        self._sharing: Sharing = sharing
        self._prefills = prefills
        self._pace = Pace(stream_interval)
        self._own_prefill_tokens = own_prefill_tokens
        self._observer = observer
        self.budget = Budget(0)  # until the engine knows what the device has left
        self.scheduler = Scheduler(limits, self.budget, self._free)
        self._caches = Caches(model.decoder, self.budget)
        builds = slim is None or not batch_invariant
        self._views = SlimViews(model.decoder, slims, slim, self.budget, builds=builds)
        self._groups = ExpertGroups(model.decoder, self._views, costs)
        # By the id of the turn, so that no turn of a session reaches into another.
        self._turns: dict[str, Session] = {}
        self._intakes: dict[str, Intake] = {}
        self._own_prefills: dict[str, PrefillRun] = {}
        decoder = model.decoder
        self.sampler = Sampler(
            slots=limits.max_sessions, vocabulary=decoder.spec.vocabulary, backend=decoder.backend
        )
        self._free_slots = list(reversed(range(limits.max_sessions)))
        self._batch_invariant = batch_invariant
        self._stepper: Stepper | None = None  # until ``open``
        self._overlap = overlap
        self._prompts_read: list[tuple[str, Session, Tensor]] = []
        """Turns that have no token yet, and what the head reads for their first, [D]."""
        self._under_way: list[UnderWay] = []
        self._step_s = 0.0  # what the last step took

    def open(self, pool: KvPool, stepper: Stepper) -> None:
        """Sets where caches lie and what runs a step. Before the first session."""
        self._caches.open(pool)
        self._stepper = stepper

    def release(self) -> None:
        """Lets go of what ``open`` was given, once all sessions have ended."""
        self._caches.close()
        self._stepper = None

    @property
    def stepper(self) -> Stepper:
        """What runs a step."""
        assert self._stepper is not None, "no step runs before there is memory"
        return self._stepper

    def costs(self, costs: StepCosts) -> None:
        """Sets what steps cost. Before the first session."""
        self._groups.costs = costs

    # -- what comes from callers -----------------------------------------------------------------

    def submit(self, task: GenerateTask | ScoreTask, sink: Sink[Event]) -> None:
        """Queues a task, or tells its sink why not."""
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

    def intake(self, turn_id: str, event: PrefillEvent) -> None:
        """An event of a turn's prefill."""
        self._with_turn(turn_id, partial(self._intake, event=event))

    def fail(self, turn_id: str, error: Exception) -> None:
        """Ends a turn, and its session with it, with an error."""
        self._with_turn(turn_id, partial(self._fail, error=error))

    def cancel(self, turn_id: str) -> None:
        """Ends a turn whose caller has gone, and its session with it."""
        self._with_turn(turn_id, partial(self._forget, why="its caller went away"))

    def stop_prefill(self, turn_id: str) -> None:
        """From any thread: a turn's own prefill is to end at once."""
        if run := self._own_prefills.get(turn_id):
            run.cancel()

    def close(self, session_id: str) -> None:
        """Frees a session in any state.

        Raises:
            SessionNotFound: there is none.
        """
        session = self._find(session_id)
        if session.state is State.IDLE:
            self._forget(session, why="it was closed")
        else:
            self._fail(session, error=SessionClosed(f"session {session_id!r} was closed"))

    def end(self, error: Exception) -> None:
        """Frees everything and tells whoever waits."""
        for session in list(self.scheduler):
            if session.state is State.IDLE:
                self._forget(session, why=str(error))
            else:
                self._fail(session, error=error)

    def info(self, session_id: str) -> SessionInfo:
        """One session.

        Raises:
            SessionNotFound: there is none.
        """
        return self._find(session_id).info(self._decoder.spec.ff_width)

    def infos(self) -> list[SessionInfo]:
        """All sessions, oldest first."""
        return [session.info(self._decoder.spec.ff_width) for session in self.scheduler]

    def page(self, after: int, most: int) -> SessionPage:
        """Up to ``most`` sessions, oldest first, of those that come after the end of a page; 0 for
        the first page."""
        found = self.scheduler.page(after, most + 1)
        sessions = found[:most]
        return SessionPage(
            sessions=[session.info(self._decoder.spec.ff_width) for session in sessions],
            last=sessions[-1].number if len(found) > most else None,
            total=len(self.scheduler),
        )

    def holdings(self) -> Holdings:
        """What is held now, by how many."""
        states = self.scheduler.states()
        views = self._views.nbytes
        return Holdings(
            sessions={state: states[state] for state in State},
            slim_view_bytes=views,
            kv_cache_bytes=self.budget.held - views,
            limit_bytes=self.budget.limit,
        )

    def snapshot(self, *, contents: bool = False) -> EngineSnapshot:
        """Everything that is held now; see ``Engine.snapshot``."""
        budget = self.budget
        return EngineSnapshot(
            sessions=tuple(
                snapshot_session(session, self._groups.form_of(session), contents=contents)
                for session in self.scheduler
            ),
            turns={turn_id: session.session_id for turn_id, session in self._turns.items()},
            scheduler=self.scheduler.snapshot(),
            handoffs=tuple(
                HandoffSnapshot(turn_id=turn_id, tokens=intake.tokens, received=intake.received)
                for turn_id, intake in self._intakes.items()
            ),
            prefills=self._prefills.snapshot(),
            views=tuple(
                ViewSnapshot(
                    users=view.users,
                    nbytes=view.nbytes,
                    ready=view.ready,
                    pending=len(view.pending),
                )
                for view in self._views.held
            ),
            groups=self._groups.snapshot(),
            free_slots=tuple(self._free_slots),
            slots_in_use=self.sampler.in_use,
            nbytes=BytesSnapshot(
                limit=budget.limit,
                idle_limit=budget.idle_limit,
                held=budget.held,
                peak=budget.peak,
                views=self._views.nbytes,
            ),
            next_due_s=self.next_due_s(),
        )

    # -- what becomes due ------------------------------------------------------------------------

    def tick(self) -> None:
        """Does what time has made due, and lets sessions in."""
        self.scheduler.expire()
        self._watch_readers()
        self._admit()

    def _admit(self) -> None:
        for session in self.scheduler.admit():
            self._guarded(session, self._begin_prefill)
        while stuck := self.scheduler.deadlocked():
            words = "memory: the kept session gave way while its next turn waited for room"
            self._fail(stuck, error=CapacityExhausted(words, retry_after_s=None))
            self._admit()

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do something."""
        return bool(
            self._groups.due
            or self._under_way
            or self._prompts_read
            or self._scoring()
            or self._runnable()
        )

    def next_due_s(self) -> float | None:
        """Seconds until something becomes due by itself; None if nothing will."""
        now = time.monotonic()
        stalled = [
            s.clock.stalled + self._limits.reader_timeout_s - now
            for s in self.scheduler.live
            if s.clock.stalled
        ]
        expiry = self.scheduler.next_expiry_s()
        due = [*stalled, *([] if expiry is None else [expiry])]
        return max(0.0, min(*due, LONGEST_WAIT_S)) if due else None

    def flush(self) -> None:
        """Reads and shows all tokens there are: something that takes long comes next."""
        self._read_all()
        for session in self.scheduler.live:
            if session.state is State.DECODE:
                session.work.flush(session)

    def step(self) -> None:
        """Runs a step: a token for every session whose reader keeps up."""
        clock = time.monotonic()
        self._views.build(BUILD_SHARE * self._step_s)
        for session, error in self._groups.advance():
            self._end_with(session, error)
        under_way, first = self._under_way, self._launch_first()
        if not self._overlap:
            self._read(first)
            first = []
        sessions = self._runnable()
        launched: list[UnderWay] = []
        if sessions:
            self._pace.set(streams=len(sessions), prompts=self._prefills.has_work)
            launched = self._launch(sessions, self._launch_step)
        steps, self._under_way = launched, []
        if self._overlap:  # the device has the next step by now, and the host reads the last one
            steps, self._under_way = under_way, launched
        read = self._read(steps)
        self._read(first)
        self._score()
        self._step_s = time.monotonic() - clock
        if read:
            self._observer.stepped(self._step_s, read)

    def _launch(
        self, sessions: list[Session], launch: Callable[[list[Session]], Draws]
    ) -> list[UnderWay]:
        """Has tokens drawn for all sessions together; if that fails, for each alone, so that it
        costs only the session whose fault it is."""
        sessions = [session for session in sessions if self._may_draw(session)]
        if not sessions:
            return []
        try:
            turns = [(session.turn_id, session) for session in sessions]
            densities = [session.density for session in sessions]
            draw = launch(sessions)
        except Exception as error:
            self._check_device()
            if len(sessions) == 1 or isinstance(error, DrawLost):
                cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
                for session in sessions:
                    self._end_with(session, cause)
                return []
            log.exception("%d sessions together failed; each is tried alone", len(sessions))
            return [step for session in sessions for step in self._launch([session], launch)]
        for session in sessions:
            session.in_flight += 1
        return [UnderWay(turns=turns, densities=densities, draw=draw)]

    def _may_draw(self, session: Session) -> bool:
        """Bans what the session's next token must not be. False if none is left: that ends it."""
        try:
            _generation(session).ban(session, self.sampler)
        except Exception as error:
            self._end_with(session, error)
            return False
        return True

    def _check_device(self) -> None:
        """After an error: a GPU that is lost says so again, and the engine ends."""
        self._decoder.backend.synchronize()

    def _launch_step(self, sessions: list[Session]) -> Draws:
        draws = self.stepper.launch(
            [_step_sequence(session) for session in sessions],
            [_generation(session).top_logprobs for session in sessions],
        )
        for session in sessions:
            assert session.cache is not None
            session.cache.advance(1)
        return draws

    def _launch_first(self) -> list[UnderWay]:
        """Has the first token of every prompt that has been read drawn, in one batch: a first
        token needs no experts."""
        read, self._prompts_read = self._prompts_read, []
        for turn_id, _, _ in read:
            self._with_turn(turn_id, self._open_slot)
        hidden = {id(s): h for turn_id, s, h in read if self._turns.get(turn_id) is s}
        sessions = [s for _, s, _ in read if id(s) in hidden]

        def launch(sessions: list[Session]) -> Draws:
            rows = [hidden[id(s)] for s in sessions]
            batches = [[row] for row in rows] if self._batch_invariant else [rows]
            logits = torch.cat([self._decoder.head(torch.stack(batch)) for batch in batches])
            slots = [s.slot for s in sessions if s.slot is not None]
            positions = [len(s.tokens) for s in sessions]
            tokens = self.sampler.sample(
                logits,
                on_device(slots, torch.int64, logits.device),
                on_device(positions, torch.int64, logits.device),
            )
            tops = [_generation(s).top_logprobs for s in sessions]
            try:
                return Draw(tokens, logits, range(len(sessions)), tops)
            except Exception as error:
                raise DrawLost from error

        return self._launch(sessions, launch) if sessions else []

    def _open_slot(self, session: Session) -> None:
        work = _generation(session)
        session.slot = self._free_slots.pop()
        self.sampler.open(session.slot, work.sampling, session.tokens)
        work.begin(session)

    def _read_all(self) -> None:
        due, self._under_way = self._under_way, []
        clock = time.monotonic()
        if read := self._read(due):
            self._observer.stepped(self._step_s + time.monotonic() - clock, read)

    def _read(self, steps: Sequence[UnderWay]) -> int:
        """Takes what was drawn. Returns for how many sessions."""
        taken = 0
        for step in steps:
            live = [self._turns.get(turn_id) is session for turn_id, session in step.turns]
            try:
                drawn = step.draw.wait()
            except Exception as error:
                self._check_device()
                for (_, session), lives in zip(step.turns, live, strict=True):
                    if lives:
                        self._end_with(session, error)
                continue
            rows = zip(step.turns, live, step.densities, drawn, strict=True)
            for (_, session), lives, density, token in rows:
                if lives:  # else it has ended, and this is the one step too many
                    session.in_flight -= 1
                    taken += 1
                    session.ran(density)
                    self._guarded(session, partial(self._take, drawn=token))
        return taken

    def _take(self, session: Session, *, drawn: Drawn) -> None:
        first = session.turn_generated == 0
        last = _generation(session).take(session, drawn)
        if last is not None:
            self._finish(session, last)
        elif first:
            self._groups.join(session)

    def _score(self) -> None:
        """The next tokens of the sessions that score, many at once."""
        sessions = self._scoring()
        for pieces in pieces_of_step(sessions[:1] if self._batch_invariant else sessions):
            self._look_up(pieces)

    def _look_up(self, pieces: Sequence[Piece]) -> None:
        """Runs pieces together; if that fails, each alone, so that it costs only the session whose
        fault it is."""
        try:
            looked_up = look_up(self._decoder, self.stepper, self._views, pieces)
        except Exception as error:
            self._check_device()
            if len(pieces) == 1:
                self._end_with(pieces[0].session, error)
                return
            log.exception("%d scores together failed; each is tried alone", len(pieces))
            for piece in pieces:
                self._look_up([piece])
            return
        for piece, chances in zip(pieces, looked_up, strict=True):
            self._guarded(piece.session, partial(self._take_chances, piece, chances))

    def _take_chances(self, piece: Piece, chances: Sequence[Chance], session: Session) -> None:
        last = piece.work.take(session, chances)
        if last is not None:
            self._finish(session, last)

    def _runnable(self) -> list[Session]:
        """Sessions of the next step."""
        sessions = []
        for session in self.scheduler.live:
            if self._runs(session) and isinstance(session.work, Generation):
                session.clock.stalled = 0.0
                if session.work.wants(session):
                    sessions.append(session)
        return sessions

    def _scoring(self) -> list[Session]:
        """Sessions that have something to look up."""
        return [s for s in self.scheduler.live if isinstance(s.work, Scoring) and self._runs(s)]

    def _runs(self, session: Session) -> bool:
        if session.state is not State.DECODE or not session.sink.ready():
            return False
        needs_view = not isinstance(session.work, Scoring) or session.work.needs_view
        return session.view is not None or not needs_view

    def _watch_readers(self) -> None:
        now = time.monotonic()
        for session in self.scheduler.live:
            if session.state is not State.DECODE or session.sink.ready():
                session.clock.stalled = 0.0
            elif not session.clock.stalled:
                session.clock.stalled = now
            elif now - session.clock.stalled >= self._limits.reader_timeout_s:
                words = f"nobody has read for {self._limits.reader_timeout_s:g} s"
                self._fail(session, error=ReaderTooSlow(f"session {session.session_id!r}: {words}"))

    # -- a session's life ------------------------------------------------------------------------

    def _find(self, session_id: str) -> Session:
        session = self.scheduler.find(session_id)
        if session is None:
            raise SessionNotFound(session_id, self.scheduler.why_gone(session_id))
        return session

    def _session_for(self, task: GenerateTask | ScoreTask) -> Session:
        if isinstance(task, ScoreTask) or task.continues is None:
            return Session(task.turn_id)
        kept = self._find(task.continues)
        if kept.state is not State.IDLE:
            raise SessionBusy(task.continues)
        return kept

    def _begin_turn(
        self, session: Session, task: GenerateTask | ScoreTask, sink: Sink[Event]
    ) -> None:
        spec = self._decoder.spec
        work: Work
        keep = False
        later_turn = bool(session.tokens)
        if isinstance(task, ScoreTask):
            selection = task.pruning.selection(self._selection, task.seed)
            work = Scoring(self._decoder, task, selection)
        else:
            base = session.selection if later_turn else self._selection
            selection = task.pruning.selection(base, task.sampling.seed)
            work = Generation(self._model, task, self._pace)
            keep = task.keep
        length = len(session.tokens) + len(task.prefilled)
        if isinstance(task, ScoreTask):
            capacity = task.run_tokens
        elif length >= spec.context_length:
            raise InvalidRequest(
                "session_id",
                f"{length} tokens with the turns before",
                f"at most {spec.context_length - 1}, one less than the context length",
            )
        else:
            capacity = min(length + task.stopping.max_tokens, spec.context_length)
        sharing = task.pruning.sharing or (session.sharing if later_turn else self._sharing)
        kv = self._caches.most_bytes(capacity, resized=later_turn or keep)
        if work.chooses:
            needs = Reservation(kv=kv, zeroed=choice_bytes(self._decoder))
        else:
            needs = Reservation(
                kv=kv,
                zeroed=self._views.zeroed_bytes(selection.experts_of(spec.ff_width)),
                view=self._views.planned_bytes(selection.experts_of(spec.ff_width)),
                pool=self._groups.pool(selection, sharing),
            )
        self.scheduler.enqueue(session, needs, task.deadline)
        session.begin_turn(
            task.turn_id,
            arrived=task.arrived,
            prompt=task.prefilled,
            capacity=capacity,
            selection=selection,
            sharing=sharing,
            work=work,
            sink=sink,
            keep=keep and self._caches.kept_bytes(capacity) <= self.budget.idle_limit,
        )

    def _begin_prefill(self, session: Session) -> None:
        later_turn = session.cache is not None
        self._caches.prepare(session)
        limit = self._own_prefill_tokens
        own = later_turn or limit is None or session.prompt_tokens <= limit
        self._intakes[session.turn_id] = self._new_intake(session)
        if own:
            token_ids = session.tokens[session.turn_start :]
            prompt = partial(
                Prompt,
                self._decoder,
                token_ids,
                session.selection,
                cache=session.cache,
                s2=session.s2,
            )
            sink = _OwnIntake(self, session)
            run = PrefillRun(prompt, sink, tokens=len(token_ids), admitted=True)
            self._own_prefills[session.turn_id] = run
            self._prefills.add(run, 0.0)
        session.sink.put(
            Admitted(
                queue_s=session.clock.admitted - session.clock.arrived,
                handoff=None if own else session.selection,
            )
        )

    def _new_intake(self, session: Session) -> Intake:
        assert session.cache is not None
        return Intake(
            self._decoder,
            session.cache,
            tokens=session.prompt_tokens,
            experts_per_layer=session.selection.experts_of(self._decoder.spec.ff_width),
        )

    def _intake(self, session: Session, *, event: PrefillEvent) -> None:
        intake = self._intakes.get(session.turn_id)
        if intake is None:
            return
        if isinstance(event, PrefillRestarted):
            self._intakes[session.turn_id] = self._new_intake(session)
        elif isinstance(event, PrefillFinished):
            self._begin_decode(session, intake, event)
        else:
            intake.take(event)

    def _begin_decode(self, session: Session, intake: Intake, event: PrefillFinished) -> None:
        """The handoff is whole: the first token is drawn by the next ``step``, with those of other
        prompts, and only then are the experts that the second one needs laid out."""
        intake.finish(session)
        del self._intakes[session.turn_id]
        self._own_prefills.pop(session.turn_id, None)
        session.clock.prefilled = time.monotonic()
        session.clock.selection_s = event.selection_s
        session.state = State.DECODE
        session.sink.put(
            Started(
                session_id=session.session_id,
                prompt_tokens=session.prompt_tokens,
                prefill_s=session.clock.prefilled - session.clock.admitted,
                selection_s=event.selection_s,
                pruning=session.figures(self._decoder.spec.ff_width),
            )
        )
        if session.experts is not None:
            self._observer.chose(session.experts)
        hidden = event.last_hidden.to(self._decoder.device, self._decoder.dtype)
        if not isinstance(session.work, Scoring):
            self._prompts_read.append((session.turn_id, session, hidden))
            return
        session.work.begin(session, hidden)
        if session.work.runs_tokens:
            self._groups.join(session)

    def _finish(self, session: Session, last: Finished | Scored) -> None:
        """Ends a turn: its session is kept or freed, and then its sink is told. What cannot be kept
        has failed, and a sink gets one last event."""
        if not session.keep:
            self._forget(session, why="it was not kept")
            session.sink.put(last)
            return
        assert session.cache is not None
        del self._turns[session.turn_id]
        self._groups.leave(session)
        self._free_slot(session)
        session.in_flight = 0  # one step too many may be under way: nothing of it counts
        self._caches.resize(session.cache, session.cache.length)
        self.scheduler.keep(session, self._caches.kept_bytes(session.cache.length))
        session.sink.put(last)
        session.rest()

    def _fail(self, session: Session, *, error: Exception) -> None:
        session.work.flush(session)
        session.sink.put(Failed(error=error))
        self._forget(session, why=f"its last turn failed: {error}")

    def _forget(self, session: Session, *, why: str) -> None:
        self.scheduler.drop(session, why)
        self._free(session)

    def _free(self, session: Session) -> None:
        """The one place where a session's memory goes."""
        self._turns.pop(session.turn_id, None)
        self._intakes.pop(session.turn_id, None)
        if run := self._own_prefills.pop(session.turn_id, None):
            run.cancel()
            self._prefills.drop(run)  # and its hold on the cache, whose bytes are about to be free
        self._groups.leave(session)
        self._free_slot(session)
        self._caches.free(session)

    def _free_slot(self, session: Session) -> None:
        if session.slot is not None:
            self.sampler.close(session.slot)
            self._free_slots.append(session.slot)
            session.slot = None

    def _with_turn(self, turn_id: str, action: Callable[[Session], None]) -> None:
        if session := self._turns.get(turn_id):
            self._guarded(session, action)

    def _guarded(self, session: Session, action: Callable[[Session], None]) -> None:
        """Whatever goes wrong in a session's turn ends that session alone."""
        try:
            action(session)
        except Exception as error:
            self._end_with(session, error)

    def _end_with(self, session: Session, error: Exception) -> None:
        if not isinstance(error, GriffinError):
            log.error("session %s failed", session.session_id, exc_info=error)
            error = EngineFault(f"{type(error).__name__}: {error}")
        self._fail(session, error=error)


def _step_sequence(session: Session) -> StepSequence:
    assert session.cache is not None and session.view is not None
    return StepSequence(
        first_slot=session.cache.first_slot,
        cached=session.cache.length,
        slim_id=session.view.slim_id,
        slot=session.slot,
    )


def _generation(session: Session) -> Generation:
    assert isinstance(session.work, Generation)
    return session.work


class _OwnIntake:
    """The sink of a prefill that the engine runs for a session of its own."""

    def __init__(self, decoding: Decoding, session: Session) -> None:
        self._decoding = decoding
        self._turn_id = session.turn_id

    def put(self, event: PrefillStreamEvent) -> None:
        if isinstance(event, Failed):
            self._decoding.fail(self._turn_id, event.error)
        elif not isinstance(event, PrefillBegun | LayerActivations):  # no session watches any
            self._decoding.intake(self._turn_id, event)

    def ready(self) -> bool:
        return True
