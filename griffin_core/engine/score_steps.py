"""Steps of the sessions that score: their next tokens, many at once.

Tokens on experts run in the same batch as those of the sessions that generate, while there are any:
all weights are then read once for both.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from griffin_core.backends.batch import StepSequence
from griffin_core.engine import look_up
from griffin_core.engine.look_up import Piece
from griffin_core.engine.scoring import Chance, Scoring
from griffin_core.engine.session import Session, State
from griffin_core.engine.sessions import Sessions
from griffin_core.forward.decode import Stepper
from griffin_core.model.decoder import Decoder
from griffin_core.slim.views import SlimViews

log = logging.getLogger(__name__)


STEPS_APART = 64
"""The number of steps in which nothing joins after a joint step has failed: what failed may fail
again, and each kind then runs twice."""


@dataclass
class Joined:
    """Pieces of scores for a step of other sessions.

    Args:
        sequences: of the pieces.
        tried: whether it was tried to run them so.
        logits: [N, V] float32 after their tokens, once they have run; None before.
    """

    pieces: Sequence[Piece]
    sequences: Sequence[StepSequence]
    tried: bool = False
    logits: Tensor | None = None


class ScoreSteps:
    """Runs the sessions that score. Owned by the engine's thread.

    Args:
        views: the slim views that tokens run on.
        batch_invariant: run one session a step.
    """

    def __init__(
        self, decoder: Decoder, sessions: Sessions, views: SlimViews, *, batch_invariant: bool
    ) -> None:
        self._decoder = decoder
        self._sessions = sessions
        self._views = views
        self._batch_invariant = batch_invariant
        self._joined: Joined | None = None
        self._apart = 0  # steps in which nothing joins

    @property
    def has_work(self) -> bool:
        """Whether ``run`` would do something."""
        return bool(self._runnable())

    def _runnable(self) -> list[Session]:
        """The sessions that have tokens to look up and a reader that keeps up."""
        return [
            session
            for session in self._sessions.scheduler.live
            if isinstance(session.turn, Scoring)
            and session.state is State.DECODE
            and session.sink.ready()
            and (session.view is not None or not session.turn.needs_view)
        ]

    def join(self, stepper: Stepper, rows: int) -> Joined | None:
        """What may run in the same batch as ``rows`` rows of sessions that generate; None for
        nothing. ``run`` looks up what was run so, and runs by itself what was not."""
        most = look_up.STEP_TOKENS
        if stepper.most_rows is not None:
            most = min(most, stepper.most_rows - rows)
        self._apart = max(0, self._apart - 1)
        if self._batch_invariant or self._apart:
            return None
        pieces = look_up.pieces_that_fit(self._runnable(), most)
        if not pieces:
            return None
        try:
            sequences = look_up.on_experts(self._views, pieces)
        except Exception:  # ``run`` meets it again, and finds out whose it is
            return None
        self._joined = Joined(pieces=pieces, sequences=sequences)
        return self._joined

    def run(self, stepper: Stepper) -> None:
        """Looks up the next tokens of all sessions that score, up to the limit of a step."""
        joined = self._look_up_joined()
        done = {id(piece.session) for piece in joined}
        sessions = [session for session in self._runnable() if id(session) not in done]
        room = look_up.STEP_TOKENS - sum(piece.rows for piece in joined)
        if self._batch_invariant:
            sessions = sessions[:1]
        for pieces in look_up.pieces_of_step(sessions, room):
            self._look_up(stepper, pieces)

    def _look_up_joined(self) -> Sequence[Piece]:
        """Looks up what ran beside other sessions, and returns it."""
        joined, self._joined = self._joined, None
        if joined is None or joined.logits is None:
            if joined is not None and joined.tried:
                self._apart = STEPS_APART
            return []
        try:
            looked_up = look_up.look_up_in(joined.logits, joined.pieces)
        except Exception:
            self._decoder.backend.synchronize()  # a lost device raises again: the engine ends
            log.exception("scores beside other sessions failed; they run by themselves")
            return []
        self._take_all(joined.pieces, looked_up)
        return joined.pieces

    def _look_up(self, stepper: Stepper, pieces: Sequence[Piece]) -> None:
        """Runs pieces together. If that fails, each is run alone, so that only the session at fault
        ends."""
        try:
            looked_up = look_up.look_up(self._decoder, stepper, self._views, pieces)
        except Exception as error:
            self._decoder.backend.synchronize()  # a lost device raises again: the engine ends
            if len(pieces) == 1:
                self._sessions.fail_with(pieces[0].session, error)
                return
            log.exception("%d scores together failed; each is tried alone", len(pieces))
            for piece in pieces:
                self._look_up(stepper, [piece])
            return
        self._take_all(pieces, looked_up)

    def _take_all(self, pieces: Sequence[Piece], looked_up: Sequence[list[Chance]]) -> None:
        for piece, chances in zip(pieces, looked_up, strict=True):
            self._sessions.guard(piece.session, partial(self._take, piece, chances))

    def _take(self, piece: Piece, chances: Sequence[Chance], session: Session) -> None:
        last = piece.turn.take(session, chances)
        if last is not None:
            self._sessions.finish(session, last)
