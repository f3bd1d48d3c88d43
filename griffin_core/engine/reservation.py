"""The most bytes that a session can come to hold, which the scheduler sets aside for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from griffin_core.experts.selection import Selection
from griffin_core.spec.choices import Sharing


@dataclass(frozen=True, kw_only=True)
class ViewPool:
    """Sessions of one kind, which reserve their slim views together.

    Args:
        sharing: of the sessions.
        kind: what their selections have in common.
        shares_with: see ``Session``; empty for sessions that do not share a set.
        max_views: the most views that they hold, however many sessions there are.
    """

    sharing: Sharing
    kind: Selection
    shares_with: str = ""
    max_views: int


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """The most bytes that one session can come to hold.

    Args:
        kv: of its KV cache.
        zeroed: of what lets it run on all weights with activations zeroed outside its experts.
        correction: of what is added to the output of its experts.
        view: of a slim view.
        pool: the sessions with which it reserves views together; None if its view is its own.
    """

    kv: int
    zeroed: int = 0
    correction: int = 0
    view: int = 0
    pool: ViewPool | None = None

    @property
    def alone(self) -> int:
        """Bytes if there is no other session."""
        return self.kv + self.zeroed + self.correction + self.view

    @property
    def own(self) -> int:
        """Bytes that no other session reserves with it."""
        return self.kv + self.zeroed + self.correction + (0 if self.pool else self.view)


def total_bytes(reservations: Iterable[Reservation]) -> int:
    """The most bytes that sessions can come to hold together."""
    everyone = list(reservations)
    total = sum(each.own for each in everyone)
    sharing = Counter((each.pool, each.view) for each in everyone if each.pool)
    for (pool, view), sessions in sharing.items():
        total += min(sessions, pool.max_views) * view
    return total
