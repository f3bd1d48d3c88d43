"""Decode steps of the sessions that generate: their next tokens are launched, then read.

Drawn tokens stay on the device as the next step's input, so with ``overlap`` the next step is
launched before the host reads the last one's tokens. A session that turns out to have ended has
then run one step too many, which is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice, zip_longest
from types import MappingProxyType

import torch

from griffin_core.backends.batch import StepSequence
from griffin_core.engine.admission import Admission
from griffin_core.engine.dense_passes import DensePasses
from griffin_core.engine.generation import Generation
from griffin_core.engine.launched_step import LaunchedStep
from griffin_core.engine.score_steps import Joined
from griffin_core.engine.session import Session, State
from griffin_core.engine.sessions import Sessions
from griffin_core.engine.speculative_steps import (
    Draft,
    Drafts,
    SpeculativeSteps,
    density_of,
    draw_next,
    generation_of,
    step_sequence,
    tokens_of,
)
from griffin_core.forward.decode import Stepper
from griffin_core.forward.draws import DrawLost, Drawn, Draws
from griffin_core.model.decoder import Decoder
from griffin_core.sampling.sampler import Sampler

log = logging.getLogger(__name__)


class TokenSteps:
    """Runs the sessions that generate. Owned by the engine's thread.

    Args:
        admission: holds the prompts that wait for their first token.
        dense_passes: run between two steps of a session.
        speculative: drafts and verifies tokens.
        overlap: launch a step before the tokens of the one before are read.
        batch_invariant: draw each first token from a batch of its own.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        sessions: Sessions,
        admission: Admission,
        dense_passes: DensePasses,
        speculative: SpeculativeSteps,
        *,
        overlap: bool,
        batch_invariant: bool,
    ) -> None:
        self._decoder = decoder
        self._sampler = sampler
        self._sessions = sessions
        self._admission = admission
        self._dense_passes = dense_passes
        self._speculative = speculative
        self._overlap = overlap
        self._batch_invariant = batch_invariant
        self._launched: list[LaunchedStep] = []

    @property
    def has_work(self) -> bool:
        """Whether ``run`` would do something."""
        return bool(self._launched or self._admission.has_prompts_read or self.runnable())

    def runnable(self) -> list[Session]:
        """The sessions of the next step: they want a token, and their reader keeps up."""
        sessions = self._able()
        for session in sessions:
            session.clock.stalled = 0.0
        return [session for session in sessions if generation_of(session).wants(session)]

    def run(
        self,
        stepper: Stepper,
        before_launch: Callable[[int], None],
        join: Callable[[Stepper, int], Joined | None],
    ) -> int:
        """Launches a token for every session that may run, and reads those that are due.

        Args:
            before_launch: called with the number of sessions in the step, if there are any.
            join: called with the same number; returns what else is to run in the step.

        Returns:
            The number of sessions that got tokens, without first ones, which come from prompts.
        """
        due, first = self._launched, self._launch_first_tokens()
        self._launched = []
        overlap = self._overlap and not self._speculative.waits(self._able())
        read = 0
        if not overlap:
            read = self._read(due)
            self._read(first)
            due = first = []
        launched: list[LaunchedStep] = []
        if sessions := self.runnable():
            before_launch(len(sessions))
            drafts: Drafts = {} if overlap else self._draft(stepper, sessions)
            # Logits of drafts may be read once more, so nothing else joins their step.
            joined = None if drafts else join(stepper, len(sessions))
            launch = partial(self._launch_step, stepper, joined, drafts)
            launched = self._launch(sessions, launch, drafts)
        if overlap:  # the device runs the next step while the host reads the last one
            self._launched = launched
        else:
            due = launched
        read += self._read(due)
        self._read(first)
        return read

    def _able(self) -> list[Session]:
        """The sessions that generate and whose reader keeps up."""
        return [
            session
            for session in self._sessions.scheduler.live
            if session.state is State.DECODE
            and isinstance(session.turn, Generation)
            and session.view is not None
            and session.sink.ready()
            and not self._dense_passes.due(session)
        ]

    def _draft(self, stepper: Stepper, sessions: list[Session]) -> Drafts:
        """Drafts tokens for the next step. If that fails, the step runs without drafts; a device
        that is lost raises."""
        try:
            return self._speculative.draft(stepper, sessions)
        except Exception as error:
            self._decoder.backend.synchronize()  # a lost device raises again: the engine ends
            log.exception("drafts for %d sessions failed", len(sessions))
            for session in list(sessions):
                if self._speculative.miscounted(session):
                    sessions.remove(session)
                    self._sessions.fail_with(session, error)
            return {}

    def read_all(self) -> int:
        """Reads every token that was launched. Returns the number of sessions that got some."""
        due, self._launched = self._launched, []
        return self._read(due)

    def _launch(
        self,
        sessions: list[Session],
        launch: Callable[[list[Session]], Draws],
        drafts: Drafts = MappingProxyType({}),
    ) -> list[LaunchedStep]:
        """Launches a draw for each session, all together: of one token, and of one more for each
        drafted token. If that fails, each session is tried alone, so that only the one at fault
        ends."""
        sessions = [session for session in sessions if self._may_draw(session)]
        if not sessions:
            return []
        try:
            own = [drafts.get(session.session_id) for session in sessions]
            turns = [(session.turn_id, session) for session in sessions]
            densities = [density_of(session) for session in sessions]
            draw = launch(sessions)
            apart = self._draw_apart(sessions, drafts, draw)
        except Exception as error:
            self._decoder.backend.synchronize()  # a lost device raises again: the engine ends
            if len(sessions) == 1 or isinstance(error, DrawLost):
                cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
                for session in sessions:
                    self._sessions.fail_with(session, cause)
                return []
            log.exception("%d sessions together failed; each is tried alone", len(sessions))
            return [
                step for session in sessions for step in self._launch([session], launch, drafts)
            ]
        for session in sessions:
            session.in_flight += 1
        return [LaunchedStep(turns=turns, densities=densities, drafts=own, draw=draw, apart=apart)]

    def _draw_apart(
        self, sessions: list[Session], drafts: Drafts, draw: Draws
    ) -> Mapping[str, Sequence[Drawn]]:
        try:
            return self._speculative.draw_one_by_one(sessions, drafts, draw) if drafts else {}
        except DrawLost:
            raise
        except Exception as error:  # the step has drawn for the others: it must not run again
            raise DrawLost from error

    def _launch_step(
        self, stepper: Stepper, joined: Joined | None, drafts: Drafts, sessions: list[Session]
    ) -> Draws:
        own = [step_sequence(session, drafts.get(session.session_id)) for session in sessions]
        tops = [generation_of(session).top_logprobs for session in sessions]
        draws = None if joined is None else self._launch_joined(stepper, joined, own, tops)
        if draws is None:
            draws = stepper.launch(own, tops)
        for session in sessions:
            assert session.cache is not None
            if session.session_id not in drafts:
                session.cache.advance(1)
        return draws

    def _launch_joined(
        self,
        stepper: Stepper,
        joined: Joined,
        own: Sequence[StepSequence],
        tops: Sequence[int | None],
    ) -> Draws | None:
        """Launches a step that others have joined. None if that fails, or was tried before: the
        sessions then run without them."""
        if joined.tried:
            return None
        joined.tried = True
        try:
            more = joined.sequences
            draws = stepper.launch([*own, *more], [*tops, *[None] * len(more)])
        except DrawLost:
            raise
        except Exception:
            self._decoder.backend.synchronize()  # a lost device raises again: the engine ends
            log.exception("%d sessions and %d scores together failed", len(own), len(more))
            return None
        joined.logits = draws.logits[len(own) :]
        draws.forget_logits()
        return draws

    def _may_draw(self, session: Session) -> bool:
        """Bans the tokens that the session's next one must not be. If none is left, the session
        ends, and this returns False."""
        try:
            generation_of(session).ban(session, self._sampler)
        except Exception as error:
            self._sessions.fail_with(session, error)
            return False
        return True

    def _launch_first_tokens(self) -> list[LaunchedStep]:
        """Launches the draw of the first token of every prompt that has been read, in one batch: a
        first token needs no experts."""
        read = self._admission.take_prompts_read()
        hidden = {id(each.session): each.hidden for each in read}

        def launch(sessions: list[Session]) -> Draws:
            rows = [hidden[id(s)] for s in sessions]
            batches = [[row] for row in rows] if self._batch_invariant else [rows]
            logits = torch.cat([self._decoder.head(torch.stack(batch)) for batch in batches])
            return draw_next(self._sampler, sessions, logits)

        return self._launch([each.session for each in read], launch)

    def _read(self, steps: Sequence[LaunchedStep]) -> int:
        """Takes what was drawn. Returns the number of sessions that got tokens."""
        sessions = 0
        for step in steps:
            live = [self._sessions.is_live(*turn) for turn in step.turns]
            try:
                drawn = step.draw.wait()
            except Exception as error:
                self._decoder.backend.synchronize()  # a lost device raises again
                for (_, session), lives in zip(step.turns, live, strict=True):
                    if lives:
                        self._sessions.fail_with(session, error)
                continue
            rest = iter(drawn)
            rows = zip(step.turns, live, step.densities, step.drafts, strict=True)
            for turn, lives, density, draft in rows:
                own = step.apart.get(turn[1].session_id)
                if own is None:
                    own = list(islice(rest, 1 + len(tokens_of(draft))))
                if lives:  # otherwise it has ended, and this is the one step too many
                    sessions += 1
                    self._accept(turn, own, density, draft)
        return sessions

    def _accept(
        self, turn: tuple[str, Session], drawn: Sequence[Drawn], density: float, draft: Draft | None
    ) -> None:
        """Takes a session's tokens up to the first that is not the drafted one."""
        _, session = turn
        drafting, drafted = generation_of(session).drafting, tokens_of(draft)
        session.in_flight -= 1
        if draft is not None:  # before a token of it ends the turn, whose figures count it
            self._speculative.note(drafting, draft, drawn)
        taken = 0
        # The draws may have ended early, where no token was left to draw.
        for token, expected in zip_longest(drawn, drafted[: len(drawn)]):
            if draft is not None:
                assert session.cache is not None
                session.cache.advance(1)
            holds = token.token == expected
            if holds and draft is not None:
                drafting.accept(draft.source)
            taken += 1
            session.ran(density)
            self._sessions.guard(session, partial(self._take, drawn=token))
            if not holds or not self._sessions.is_live(*turn):
                break
        if self._sessions.is_live(*turn):
            if density < 1:
                self._dense_passes.note_slim(session, taken)
            self._sessions.guard(session, self._dense_passes.begin_due)

    def _take(self, session: Session, *, drawn: Drawn) -> None:
        first = session.turn_generated == 0
        last = generation_of(session).take(session, drawn)
        if last is not None:
            self._sessions.finish(session, last)
            return
        if first:
            self._sessions.join(session)
