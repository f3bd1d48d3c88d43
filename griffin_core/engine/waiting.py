"""Sessions that wait for room: a queue for each owner, and the queues have their turns."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator
from itertools import chain, zip_longest

from griffin_core.engine.session import Session


class WaitingSessions:
    """Sessions that wait, by owner and in order of arrival.

    The owners take turns: after one of an owner's sessions has begun, that owner is the last. So a
    session waits for as many sessions of another owner as of its own, however many wait there.
    """

    def __init__(self) -> None:
        self._by_owner: dict[str, dict[str, Session]] = {}  # the owner whose turn is next, first
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Session]:
        """All of them, in the order in which they would begin if each had room."""
        rows = zip_longest(*(queue.values() for queue in self._by_owner.values()))
        return (session for session in chain.from_iterable(rows) if session is not None)

    def add(self, session: Session) -> None:
        """Puts a session at the end of its owner's queue."""
        self._by_owner.setdefault(session.owner, {})[session.session_id] = session
        self._size += 1

    def take(self, session: Session) -> None:
        """Removes a session that begins. Its owner is now the last."""
        self.discard(session)
        if (queue := self._by_owner.pop(session.owner, None)) is not None:
            self._by_owner[session.owner] = queue

    def discard(self, session: Session) -> None:
        """Removes a session. Without effect if it is not there."""
        queue = self._by_owner.get(session.owner, {})
        if queue.pop(session.session_id, None) is not None:
            self._size -= 1
            if not queue:
                del self._by_owner[session.owner]

    def count(self, owner: str) -> int:
        """The number of an owner's sessions."""
        return len(self._by_owner.get(owner, ()))

    def ahead_of_next(self, owner: str, capped: Collection[str] = ()) -> int:
        """The number of sessions that would begin before the next one of an owner.

        Args:
            capped: owners whose sessions wait for their own to end.
        """
        own = self.count(owner)
        return sum(
            min(len(queue), own if name == owner else own + 1)
            for name, queue in self._by_owner.items()
            if name == owner or name not in capped
        )

    def blocks(self, owner: str, capped: Collection[str]) -> bool:
        """Whether the next session of an owner would have to wait for one that is here.

        Args:
            capped: see ``ahead_of_next``.
        """
        return any(name == owner or name not in capped for name in self._by_owner)

    def gives_way(self, owner: str, kept: Container[Session]) -> Session | None:
        """The session that must give its place in a full queue to one of this owner: the youngest
        of an owner with at least two more, of the owner with the most first. None if there is none.

        Args:
            kept: sessions that end with their turn. They stay if another can go, and go before one
                owner keeps out the others.
        """
        least = self.count(owner) + 2
        queues = (queue for queue in self._by_owner.values() if len(queue) >= least)
        longest_first = sorted(queues, key=len, reverse=True)
        youngest_first = [list(reversed(queue.values())) for queue in longest_first]
        for session in chain.from_iterable(youngest_first):
            if session not in kept:
                return session
        return youngest_first[0][0] if youngest_first else None
