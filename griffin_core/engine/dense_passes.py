"""Dense passes over the last tokens of a session: their keys and values are written again, and
their activations join its statistics.

A session that warms up gets one when enough of its tokens have run; all of them then choose its
experts. A session with checks gets one over its last ``CHECKED_TOKENS`` tokens every so often: what
slim steps wrote into its KV cache is replaced, and the dense model's logits tell which of these
tokens it would have drawn itself. The pass waits among the prompts (``prefill_queue``), and no step
of the session runs meanwhile.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial

from griffin_core.engine.generation import Generation
from griffin_core.engine.pauses import check_due, is_warm, tries_slim, warming_up
from griffin_core.engine.ports import Observer
from griffin_core.engine.session import Session
from griffin_core.engine.session_prefills import SessionPrefills
from griffin_core.engine.sessions import Sessions
from griffin_core.experts.selection import select_experts
from griffin_core.forward.events import PrefillEvent, PrefillFinished, PromptExperts
from griffin_core.model.decoder import Decoder
from griffin_core.sampling.sampler import Sampler

CHECKED_TOKENS = 32
"""The number of tokens of a check. The first check of a turn comes after as many slim ones."""

MOST_SHARE = 0.05
"""The most of the steps' time that checks take."""

REFRESHED_BELOW = 256
"""A check chooses the experts again while the session has fewer tokens than this; with more, fresh
activations change little (the harm is in the KV)."""

GIVEN_UP_TOKENS = 8 * CHECKED_TOKENS
"""After a check that failed, the next one comes after so many tokens."""

SMOOTHING = 0.2
"""Weight of the last step in the smoothed length of a step."""


class DensePasses:
    """Begins dense passes, and takes what comes of them. Owned by the engine's thread.

    Args:
        prefills: reads the tokens.
        observer: is told what checks measure.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        sessions: Sessions,
        prefills: SessionPrefills,
        observer: Observer,
    ) -> None:
        self._decoder = decoder
        self._sampler = sampler
        self._sessions = sessions
        self._prefills = prefills
        self._observer = observer
        self._step_s = 0.0  # smoothed

    def note_step(self, seconds: float) -> None:
        """Notes what a step of all sessions took."""
        self._step_s += SMOOTHING * (seconds - self._step_s) if self._step_s else seconds

    @staticmethod
    def note_slim(session: Session, tokens: int) -> None:
        """Notes that a session has just made so many tokens on experts."""
        if (session.checks or session.control is not None) and not session.check_at:
            session.check_at = len(session.tokens) - 1 - tokens + CHECKED_TOKENS

    @staticmethod
    def due(session: Session) -> bool:
        """Whether no step of a session may run before its next pass has, or its next choice."""
        waits = is_warm(session) or check_due(session) or tries_slim(session)
        return session.in_dense_pass or waits

    def begin_due(self, session: Session) -> None:
        """Begins a session's pass, if one is due and the host has read all its tokens."""
        if session.in_dense_pass or session.in_flight:
            return
        if session.control is not None and tries_slim(session):
            session.control.prune()
            self._follow(session)
        if not self.due(session):
            return
        assert session.cache is not None
        if not is_warm(session) and session.density == 1:  # it runs dense for now
            session.check_at = 0
            return
        session.in_dense_pass = True
        begin = session.uncounted_from
        if not is_warm(session):
            begin = max(begin, session.cache.length - CHECKED_TOKENS)
        self._prefills.reread(session, begin, self._receive, checks=not is_warm(session))

    def _receive(self, turn_id: str, event: PrefillEvent | Exception) -> None:
        session = self._sessions.turns.get(turn_id)
        if session is None or not session.in_dense_pass:
            return
        match event:
            case Exception():
                self._prefills.end_reread(turn_id)
                self._give_up(session, event)
            case PromptExperts():
                session.pass_read = event
            case PrefillFinished():
                self._prefills.end_reread(turn_id)
                done = partial(self._finish, compute_s=event.compute_s)
                self._sessions.guard(session, done)

    def _give_up(self, session: Session, error: Exception) -> None:
        """A pass has failed. A check was extra: the session goes on without, for a while. What the
        pass has written is of the same tokens."""
        if warming_up(session):
            self._sessions.fail(session, error)
            return
        assert session.cache is not None
        session.in_dense_pass, session.pass_read = False, None
        session.cache.advance(len(session.tokens) - 1 - session.cache.length)
        session.check_at = session.cache.length + GIVEN_UP_TOKENS

    def _finish(self, session: Session, *, compute_s: float) -> None:
        assert session.cache is not None and isinstance(session.turn, Generation)
        read, session.pass_read = session.pass_read, None
        assert read is not None
        session.in_dense_pass = False
        warmed_up = warming_up(session)
        session.uncounted_from = session.cache.length
        if read.hidden is not None:
            clock = time.monotonic()
            logits = self._decoder.head(read.hidden)
            drawn = session.turn.redraw(session, self._sampler, logits)
            made = session.tokens[-len(drawn) :]
            agreed = sum(one == other for one, other in zip(drawn, made, strict=True))
            session.note_check(len(drawn), agreed)
            self._observer.checked(len(drawn), agreed)
            if session.control is not None:
                session.control.checked(agreed / len(drawn), len(session.tokens))
            spent_s = compute_s + time.monotonic() - clock
            session.check_at = session.cache.length + self.interval(spent_s)
        if session.control is not None and read.hidden is not None:
            session.counted(read.statistics)
            self._follow(session)
        elif warmed_up or self._refreshes(session):
            session.chosen(read.statistics, read.slim, read.norm_mass, read.tails)
            self._sessions.rejoin(session)
        else:
            session.counted(read.statistics)

    def _follow(self, session: Session) -> None:
        """Chooses a session's experts at the density that its control says, if that has changed or
        a check would choose them again."""
        assert session.control is not None and session.statistics is not None
        density = session.control.density
        if density == session.selection.density and not self._refreshes(session):
            return
        session.selection = replace(session.selection, density=density)
        slim = select_experts(
            session.statistics,
            session.selection,
            magnitude=self._decoder.magnitudes,
            calibration=self._decoder.calibration,
        )
        session.check_at = session.check_at if density < 1 else 0
        session.chosen(session.statistics, slim, tails=session.tails)
        self._sessions.rejoin(session)

    def _refreshes(self, session: Session) -> bool:
        """Whether a check chooses experts again. A residual stays with those it was fitted to: the
        inputs of the prompt are gone."""
        own = None if session.slim is None else session.slim.correction
        fitted = own is not None and own.rank > 0
        few = len(session.tokens) < REFRESHED_BELOW
        return few and not fitted and session.sharing != "shared"

    def interval(self, check_s: float) -> int:
        """The number of tokens until a session's next check, so that the checks of all sessions
        take no more than ``MOST_SHARE`` of the steps' time.

        Args:
            check_s: seconds of the last one.
        """
        checked = sum(session.check_at > 0 for session in self._sessions.scheduler.live)
        step_s = max(self._step_s, 1e-6)
        return max(CHECKED_TOKENS, math.ceil(checked * check_s / (MOST_SHARE * step_s)))
