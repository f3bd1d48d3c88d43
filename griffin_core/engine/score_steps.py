"""Steps of the sessions that score: their next tokens, many at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from griffin_core.engine.look_up import Piece, look_up, pieces_of_step
from griffin_core.engine.scoring import Chance, Scoring
from griffin_core.engine.session import Session, State
from griffin_core.engine.sessions import Sessions
from griffin_core.forward.decode import Stepper
from griffin_core.model.decoder import Decoder
from griffin_core.slim.views import SlimViews

log = logging.getLogger(__name__)


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

    def run(self, stepper: Stepper) -> None:
        """Looks up the next tokens of all sessions that score, up to the limit of a step."""
        sessions = self._runnable()
        for pieces in pieces_of_step(sessions[:1] if self._batch_invariant else sessions):
            self._look_up(stepper, pieces)

    def _look_up(self, stepper: Stepper, pieces: Sequence[Piece]) -> None:
        """Runs pieces together. If that fails, each is run alone, so that only the session at fault
        ends."""
        try:
            looked_up = look_up(self._decoder, stepper, self._views, pieces)
        except Exception as error:
            self._decoder.backend.synchronize()  # a lost device raises again: the engine ends
            if len(pieces) == 1:
                self._sessions.fail_with(pieces[0].session, error)
                return
            log.exception("%d scores together failed; each is tried alone", len(pieces))
            for piece in pieces:
                self._look_up(stepper, [piece])
            return
        for piece, chances in zip(pieces, looked_up, strict=True):
            self._sessions.guard(piece.session, partial(self._take, piece, chances))

    def _take(self, piece: Piece, chances: Sequence[Chance], session: Session) -> None:
        last = piece.turn.take(session, chances)
        if last is not None:
            self._sessions.finish(session, last)
