"""In which form each session runs: on its own experts, on those of its group, or dense.

``auto`` sessions run dense unless pruning gains enough of a step's time, and then in whatever form
costs least. What steps cost was measured at start (``slim.costs``). A form is kept for a while.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from griffin_core.engine.expert_group import STEPS_HELD, Form, GroupKey, Seat
from griffin_core.slim.costs import StepCosts
from griffin_core.slim.views import SlimViews

LEAST_GAIN, KEPT_GAIN = 0.05, 0.03
"""Shares of a dense step's time: what pruning must gain before ``auto`` sessions take it up, and
below which they drop it again."""

ABOUT_EQUAL = 1.03
"""Costs within this factor of each other are no reason to change the form, nor to share a set."""


class FormChoice:
    """Decides on forms, and on whether sessions on their own experts have copies of them.

    Args:
        costs: of a step.
        views: say whether views are copies, which do not always pay.
    """

    def __init__(self, costs: StepCosts, views: SlimViews) -> None:
        self.costs = costs
        self._views = views
        self._copies = False  # whether sessions on their own experts have copies of them now
        self.due_at: int | None = None
        """Number of the step before which to decide again; None if nothing waits for it."""
        self._auto_form: Form = "dense"
        self._auto_since = self._copies_since = -STEPS_HELD

    def decide(self, seats: Collection[Seat], step: int) -> None:
        """Settles every session's form.

        Args:
            step: number of the step that comes next.
        """
        self.due_at = None
        self._decide_auto(seats, step)
        for seat in seats:
            seat.form = self._form_of(seat)
        self._decide_copies(seats, step)

    def wants_view(self, seat: Seat) -> bool:
        """Whether a session is to have a view of its own experts."""
        if seat.form != "own":
            return False
        return not self._views.copies or (self._copies and seat.one_row)

    def _form_of(self, seat: Seat) -> Form:
        if not seat.prunes:
            return "dense"
        match seat.session.sharing:
            case "private":
                return "own"
            case "shared":
                return "shared"
            case "auto":
                return self._auto_form if seat.auto else "own"

    def _decide_auto(self, seats: Collection[Seat], step: int) -> None:
        """Chooses the form of all ``auto`` sessions by what the step would cost."""
        if not any(seat.auto for seat in seats):
            self._auto_form, self._auto_since = "dense", -STEPS_HELD
            return
        forms: Sequence[Form] = ("dense", "own", "shared")
        costs = {form: self._step_s(seats, form) for form in forms}
        dense, now = costs["dense"], self._auto_form
        best: Form = "own" if costs["own"] <= ABOUT_EQUAL * costs["shared"] else "shared"
        if now != "dense" and costs[now] <= ABOUT_EQUAL * costs[best]:
            best = now
        gain = 1 - costs[best] / dense
        if gain < (LEAST_GAIN if now == "dense" else KEPT_GAIN):
            best = "dense"
        if best == now:
            return
        if step - self._auto_since < STEPS_HELD and costs[now] <= dense:
            self._decide_later(self._auto_since)
            return
        self._auto_form, self._auto_since = best, step

    def _step_s(self, seats: Collection[Seat], form: Form) -> float:
        """Seconds of a step with all ``auto`` sessions in one form and the others as they are."""
        dense, own, shared = 0, [], Counter[GroupKey]()
        for seat in seats:
            of = form if seat.auto else self._form_of(seat)
            if of == "dense":
                dense += 1
            elif of == "own":
                own.append(seat.slim.density)
            else:
                shared[seat.key] += 1
        groups = [(key.kind.density, rows) for key, rows in shared.items()]
        return self.costs.step_s(dense=dense, own=own, shared=groups)

    def _decide_copies(self, seats: Collection[Seat], step: int) -> None:
        if not (self._views.copies and self._views.builds):
            return
        own = [seat.slim.density for seat in seats if seat.form == "own" and seat.one_row]
        pays = self.costs.copies_pay(whole=sum(s.form == "dense" for s in seats), own=own)
        if not own:
            self._copies, self._copies_since = False, -STEPS_HELD
        elif pays and not self._copies and step - self._copies_since < STEPS_HELD:
            self._decide_later(self._copies_since)
        elif pays != self._copies:
            self._copies, self._copies_since = pays, -STEPS_HELD if pays else step

    def _decide_later(self, since: int) -> None:
        due = since + STEPS_HELD
        self.due_at = due if self.due_at is None else min(due, self.due_at)
