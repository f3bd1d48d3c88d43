"""All sessions of an engine, by id and by age, and why those that are gone ended."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import count

from griffin_core.engine.session import Session
from griffin_core.errors import SessionNotFound

REMEMBERED = 1024
"""Sessions whose end can still be explained."""


class SessionTable:
    """Every session there is, whatever its state. Only ``__iter__`` takes longer the more sessions
    there are."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._by_id: dict[str, Session] = {}
        self._by_number: list[Session] = []
        self._closed: OrderedDict[str, str] = OrderedDict()  # session id -> reason

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Session]:
        """All sessions, oldest first. The table may change meanwhile."""
        return iter(list(self._by_number))

    def __contains__(self, session: Session) -> bool:
        return session.session_id in self._by_id

    def add(self, session: Session) -> None:
        """Adds a session as the youngest. Without effect if it is there already."""
        if session not in self:
            session.number = next(self._numbers)
            self._by_id[session.session_id] = session
            self._by_number.append(session)

    def remove(self, session: Session, reason: str) -> None:
        """Removes a session and remembers why. Without effect on the others if it is not there."""
        if self._by_id.pop(session.session_id, None) is not None:
            del self._by_number[bisect_left(self._by_number, session.number, key=_number)]
        self._closed[session.session_id] = reason
        while len(self._closed) > REMEMBERED:
            self._closed.popitem(last=False)

    def find(self, session_id: str) -> Session:
        """The session of an id.

        Raises:
            SessionNotFound: there is none; the error says what became of it.
        """
        session = self._by_id.get(session_id)
        if session is None:
            raise SessionNotFound(session_id, self.closed_reason(session_id))
        return session

    def closed_reason(self, session_id: str) -> str:
        """Why there is no session of this id."""
        return self._closed.get(session_id, "it never was, or ended long ago")

    def page(self, after: int, size: int) -> list[Session]:
        """Up to ``size`` sessions with numbers above ``after``, oldest first."""
        first = bisect_right(self._by_number, after, key=_number)
        return self._by_number[first : first + size]


def _number(session: Session) -> int:
    return session.number
