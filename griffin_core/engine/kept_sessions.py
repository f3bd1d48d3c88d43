"""Sessions that are kept between turns, by owner, and the bytes that they hold."""

from __future__ import annotations

from collections import OrderedDict

from griffin_core.engine.session import Session


class KeptSessions:
    """Sessions that are kept, in the order in which they were added, and the sums of their bytes:
    an engine may keep tens of thousands."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()
        self._by_owner: dict[str, OrderedDict[str, Session]] = {}
        self._bytes_of: dict[str, int] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session: object) -> bool:
        return isinstance(session, Session) and _key(session) in self._sessions

    @property
    def session_ids(self) -> tuple[str, ...]:
        """The ids of all of them, in order."""
        return tuple(session_id for _, session_id in self._sessions)

    @property
    def oldest(self) -> Session | None:
        """The session that was added first; None if there is none."""
        return next(iter(self._sessions.values()), None)

    @property
    def spared_least(self) -> Session | None:
        """The session that goes first where room is wanted: the oldest one of the owner that holds
        the most. None if there is none."""
        if not self._bytes_of:
            return None
        owner = max(self._bytes_of, key=self._bytes_of.__getitem__)
        return next(iter(self._by_owner[owner].values()))

    def add(self, session: Session) -> None:
        """Adds a session, whose reservation is now for its cache alone."""
        self._sessions[_key(session)] = session
        self._by_owner.setdefault(session.owner, OrderedDict())[session.session_id] = session
        self._count(session.owner, session.reservation.kv)

    def discard(self, session: Session) -> None:
        """Removes a session. Without effect if it is not there."""
        if self._sessions.pop(_key(session), None) is not None:
            del self._by_owner[session.owner][session.session_id]
            self._count(session.owner, -session.reservation.kv)
            if not self._by_owner[session.owner]:
                del self._by_owner[session.owner], self._bytes_of[session.owner]

    def _count(self, owner: str, nbytes: int) -> None:
        self.nbytes += nbytes
        self._bytes_of[owner] = self._bytes_of.get(owner, 0) + nbytes


def _key(session: Session) -> tuple[str, str]:
    return session.owner, session.session_id
