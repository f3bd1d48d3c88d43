"""All sessions of an engine, by owner, id and age, and why those that are gone ended."""

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
    there are.

    Each session is listed twice: for its owner, and under the owner None for those who may see
    everybody's. So one look-up says whether a session exists and whether the caller may know that.
    """

    def __init__(self) -> None:
        self._numbers = count(1)
        self._by_id: dict[tuple[str | None, str], Session] = {}
        self._by_number: dict[str | None, list[Session]] = {None: []}
        self._closed: OrderedDict[tuple[str | None, str], str] = OrderedDict()  # why it ended

    def __len__(self) -> int:
        return self.count(None)

    def __iter__(self) -> Iterator[Session]:
        """All sessions, oldest first. The table may change meanwhile."""
        return iter(list(self._by_number[None]))

    def __contains__(self, session: Session) -> bool:
        return (session.owner, session.session_id) in self._by_id

    def count(self, owner: str | None) -> int:
        """The number of an owner's sessions, or of all with None."""
        return len(self._by_number.get(owner, ()))

    def add(self, session: Session) -> None:
        """Adds a session as the youngest. Without effect if it is there already."""
        if session not in self:
            session.number = next(self._numbers)
            for owner in (session.owner, None):
                self._by_id[owner, session.session_id] = session
                self._by_number.setdefault(owner, []).append(session)

    def remove(self, session: Session, reason: str) -> None:
        """Removes a session and remembers why. Without effect on the others if it is not there."""
        for owner in (session.owner, None):
            if self._by_id.pop((owner, session.session_id), None) is not None:
                of_owner = self._by_number[owner]
                del of_owner[bisect_left(of_owner, session.number, key=_number)]
                if owner is not None and not of_owner:
                    del self._by_number[owner]
            self._closed[owner, session.session_id] = reason
        while len(self._closed) > 2 * REMEMBERED:
            self._closed.popitem(last=False)

    def find(self, session_id: str, owner: str | None = None) -> Session:
        """The session of an id.

        Args:
            owner: whose it must be; None for anybody's.

        Raises:
            SessionNotFound: there is none; the error says what became of it. For a session of
                another owner it is the same as for one that never was.
        """
        session = self._by_id.get((owner, session_id))
        if session is None:
            raise SessionNotFound(session_id, self.closed_reason(session_id, owner))
        return session

    def closed_reason(self, session_id: str, owner: str | None = None) -> str:
        """Why the owner has no session of this id."""
        return self._closed.get((owner, session_id), "it never was, or ended long ago")

    def page(self, after: int, size: int, owner: str | None = None) -> list[Session]:
        """Up to ``size`` sessions of an owner, or of all, with numbers above ``after``, oldest
        first."""
        of_owner = self._by_number.get(owner, [])
        first = bisect_right(of_owner, after, key=_number)
        return of_owner[first : first + size]


def _number(session: Session) -> int:
    return session.number
