"""What a session does in a turn, once its prompt has been read: generate, or score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from griffin_core.backends.base import Layout
from griffin_core.engine.density_control import DensityControl
from griffin_core.engine.reservation import Reservation
from griffin_core.experts.selection import Selection
from griffin_core.spec.choices import Sharing

if TYPE_CHECKING:
    from griffin_core.engine.session import Session


class Turn(Protocol):
    """A ``Generation`` or a ``Scoring``. It puts events into the session's sink, except for the
    turn's last event, which it returns."""

    layout: Layout
    """For how many rows at once the session's slim view is laid out."""
    chooses: bool
    """Whether the turn chooses experts by itself. ``ExpertGroups`` then runs the session on all
    neurons."""

    def flush(self, session: Session) -> None:
        """Emits what it still holds back: something that takes long comes next, or the turn has
        failed."""
        ...


@dataclass(frozen=True, kw_only=True)
class TurnPlan:
    """All that is settled about a turn before it is queued.

    Args:
        turn_id: names this turn, and no other turn of the session.
        arrived: when the call came, on ``time.monotonic``.
        prompt: the token ids that this turn adds.
        capacity: tokens that the KV cache must hold by the end of the turn.
        selection: how its experts are chosen.
        asked: what a later turn takes over where it sets nothing.
        sharing: with which sessions it may run on one expert set.
        turn: what to do after the prefill.
        checks: whether dense passes check its tokens.
        control: what sets its density; None for the one of ``selection``.
        keep: whether to keep the session for a next turn.
        deadline: until when the caller waits, on ``time.monotonic``; None for no limit.
        needs: the most bytes that the session comes to hold.
    """

    turn_id: str
    arrived: float
    prompt: Sequence[int]
    capacity: int
    selection: Selection
    asked: Selection
    sharing: Sharing
    turn: Turn
    checks: bool = False
    control: DensityControl | None = None
    keep: bool
    deadline: float | None
    needs: Reservation
