"""Dense passes over the last tokens of a session: their keys and values are written again, and
their activations join its statistics.

A session that warms up gets one when enough of its tokens have run; all of them then choose its
experts. The pass waits among the prompts (``prefill_queue``), and no step of the session runs
meanwhile.
"""

from __future__ import annotations

from functools import partial

from griffin_core.engine.session import Session
from griffin_core.engine.session_prefills import SessionPrefills
from griffin_core.engine.sessions import Sessions
from griffin_core.forward.events import PrefillEvent, PromptExperts


class DensePasses:
    """Begins dense passes, and takes what comes of them. Owned by the engine's thread.

    Args:
        prefills: reads the tokens.
    """

    def __init__(self, sessions: Sessions, prefills: SessionPrefills) -> None:
        self._sessions = sessions
        self._prefills = prefills

    @staticmethod
    def due(session: Session) -> bool:
        """Whether no step of a session may run before its next pass has."""
        return session.in_dense_pass or session.warm

    def begin_due(self, session: Session) -> None:
        """Begins a session's pass, if one is due and the host has read all its tokens."""
        if self.due(session) and not session.in_dense_pass and not session.in_flight:
            session.in_dense_pass = True
            self._prefills.reread(session, session.uncounted_from, self._receive)

    def _receive(self, turn_id: str, event: PrefillEvent | Exception) -> None:
        session = self._sessions.turns.get(turn_id)
        if session is None or not session.in_dense_pass:
            return
        if isinstance(event, Exception):
            self._sessions.fail(session, event)
        elif isinstance(event, PromptExperts):
            self._sessions.guard(session, partial(self._choose, read=event))

    def _choose(self, session: Session, *, read: PromptExperts) -> None:
        assert session.cache is not None
        session.in_dense_pass = False
        session.uncounted_from = session.cache.length
        session.chosen(read.statistics, read.slim, read.norm_mass, read.tails)
        self._sessions.rejoin(session)
