"""Which experts each session runs on, and in which form.

A ``private`` session runs on what its own prompt chose. ``shared`` sessions of one owner,
density and policy run on one set (``expert_group``). ``auto`` sessions run in the form that pays
(``form_choice``).

Nothing here makes a session wait: until a view is built, and whenever a copy would not pay, a
session runs on all weights with its activations zeroed outside its set, or dense if it is ``auto``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from griffin_core.engine.expert_group import ExpertGroup, GroupKey, Seat, can_run
from griffin_core.engine.form_choice import FormChoice
from griffin_core.engine.pauses import warming_up
from griffin_core.engine.reservation import ViewPool
from griffin_core.engine.session import Session
from griffin_core.engine.snapshot import GroupSnapshot, GroupsSnapshot, RunForm
from griffin_core.experts.selection import Selection
from griffin_core.forward.correction import corrected
from griffin_core.model.decoder import Decoder
from griffin_core.slim.base import RunView
from griffin_core.slim.costs import StepCosts
from griffin_core.slim.views import SlimView, SlimViews
from griffin_core.spec.choices import Sharing


class ExpertGroups:
    """What all sessions of an engine run on. Owned by the engine's thread.

    A session holds at most one view, and a group one in place of its members' views. A view is
    acquired only after the one that it replaces was released, so what sessions reserve is enough.

    Args:
        costs: of a step.
    """

    def __init__(self, decoder: Decoder, views: SlimViews, costs: StepCosts) -> None:
        self._decoder = decoder
        self._views = views
        self._forms = FormChoice(costs, views)
        self._seats: dict[str, Seat] = {}  # by session id
        self._shared: dict[GroupKey, ExpertGroup] = {}
        self._building: list[Seat] = []  # their own views are not complete yet
        self._failed: list[tuple[Session, Exception]] = []
        self._step = 0

    @property
    def costs(self) -> StepCosts:
        """What steps cost."""
        return self._forms.costs

    def set_costs(self, costs: StepCosts) -> None:
        """Sets what steps cost. Before the first session."""
        self._forms.costs = costs

    def pool(
        self,
        selection: Selection,
        sharing: Sharing,
        shares_with: str = "",
        densities: Sequence[float] = (),
    ) -> ViewPool | None:
        """The sessions with which a session reserves its view: a shared group has one view
        together, and there are never more copies than pay.

        Args:
            shares_with: see ``Session``.
            densities: those that the session may come to run at; empty for that of its selection.
        """
        if not self._views.builds or (sharing != "shared" and not self._views.copies):
            return None
        if sharing == "shared":
            return ViewPool(
                sharing=sharing,
                kind=selection.kind,
                shares_with=shares_with,
                max_views=max(1, sum(density < 1 for density in densities)),
            )
        most = max(map(self._forms.costs.max_copies, densities or (selection.density,)))
        return ViewPool(sharing=sharing, kind=selection.kind, max_views=most)

    def join(self, session: Session) -> None:
        """Lets a session run from the next step on. It has its statistic and its own experts."""
        assert session.slim is not None and session.statistics is not None
        runs_dense = session.turn.chooses or warming_up(session)
        if not runs_dense:
            if session.slim.correction is None:
                session.slim = corrected(
                    self._decoder,
                    session.slim,
                    session.statistics,
                    session.selection,
                    session.tails,
                )
            own = session.slim.correction
        # A check or a control may choose again, and fit another.
        if not runs_dense and session.control is None and not session.checks:
            nbytes = 0 if own is None else own.nbytes  # what it was fitted to is freed
            session.reservation = replace(session.reservation, correction=nbytes)
        if not warming_up(session) and session.control is None:
            session.tails = ()
        size = session.reservation.zeroed + session.reservation.correction
        self._views.acquire_zeroed(size)
        prunes = session.slim.prunes and not runs_dense
        seat = Seat(session, size, prunes=prunes)
        self._seats[session.session_id] = seat
        self._decide(self._step + 1)

    def leave(self, session: Session) -> None:
        """A session has ended. Without effect if it has not joined."""
        seat = self._seats.pop(session.session_id, None)
        if seat is None:
            return
        self._leave_group(seat)
        self._release(seat)
        self._views.release_zeroed(seat.zeroed_bytes)
        self._failed = [(failed, error) for failed, error in self._failed if failed is not session]
        session.view = None
        session.view_bytes = 0
        self._forms.due_at = self._step

    @property
    def due(self) -> bool:
        """Whether ``advance`` has something to do, even without a step to run."""
        decides = self._forms.due_at is not None and self._forms.due_at <= self._step
        chooses = any(group.chooses(self._step) for group in self._shared.values())
        return decides or chooses or self._views.building or bool(self._failed)

    def snapshot(self) -> GroupsSnapshot:
        """Which sessions have experts to run on, and in which groups."""
        return GroupsSnapshot(
            sessions=tuple(self._seats),
            shared=tuple(
                GroupSnapshot(
                    density=key.kind.density,
                    policy=key.kind.policy,
                    members=tuple(seat.session.session_id for seat in group.members),
                )
                for key, group in self._shared.items()
            ),
            due=self.due,
        )

    def form_of(self, session: Session) -> RunForm | None:
        """What a session's next step runs on; None before it has joined."""
        seat = self._seats.get(session.session_id)
        if seat is None or session.view is None:
            return None
        if session.view.slim is None:
            return "dense"
        if not isinstance(session.view, SlimView):
            return "zeroed"
        return "own" if seat.group is None else "shared"

    def advance(self) -> list[tuple[Session, Exception]]:
        """Does what is due before the next step.

        Returns:
            The sessions that failed, and how.
        """
        self._step += 1
        if self._forms.due_at is not None and self._step >= self._forms.due_at:
            self._decide(self._step)
        failed, self._failed = self._failed, []
        for group in list(self._shared.values()):
            if group.rests:
                continue
            try:
                group.advance(self._decoder, self._views, self._step)
            except Exception as error:
                told = {session.session_id for session, _ in failed}
                members = [seat.session for seat in group.members]
                failed += [(one, error) for one in members if one.session_id not in told]
                continue
            self._use_all(group.members)
            group.rests = group.settled
        for seat in list(self._building):
            assert seat.view is not None
            if seat.view.error is not None:
                failed.append((seat.session, seat.view.error))
            elif seat.view.ready:
                self._building.remove(seat)
                self._use_all([seat])
        return failed

    # -- what each session runs on ---------------------------------------------------------------

    def _decide(self, step: int) -> None:
        """Settles every session's form, after sessions came or went, or when a form was kept for
        long enough.

        Args:
            step: number of the step that comes next.
        """
        seats = list(self._seats.values())
        self._forms.decide(seats, step)
        for seat in seats:  # what is released first makes room for what is acquired then
            if seat.form != "shared":
                self._leave_group(seat)
            if not self._forms.wants_view(seat):
                self._release(seat)
        for seat in seats:
            if seat.form == "shared" and seat.group is None:
                self._join_group(seat)
            if self._forms.wants_view(seat) and seat.view is None:
                try:
                    seat.view = self._views.acquire(
                        seat.slim, seat.session.turn.layout, shares_with=seat.key.shares_with
                    )
                    self._building.append(seat)
                except Exception as error:  # it must not end the session that came or went
                    self._failed.append((seat.session, error))
        for group in self._shared.values():
            if group.slim is None:
                try:
                    group.advance(self._decoder, self._views, step)
                except Exception as error:
                    self._failed += [(member.session, error) for member in group.members]
        self._use_all([seat for seat in seats if seat.group is None or seat.group.slim])

    def _use_all(self, seats: Sequence[Seat]) -> None:
        """Lets sessions run on what is ready for their forms. The next ``advance`` returns those
        for which that fails."""
        for seat in list(seats):
            try:
                self._use(seat)
            except Exception as error:
                seat.session.view = None
                self._failed.append((seat.session, error))

    def _use(self, seat: Seat) -> None:
        """Lets a session run on what is ready for its form."""
        session = seat.session
        owner = seat if seat.group is None else seat.group
        held = owner.view
        runs_on: RunView = self._views.dense
        if seat.form != "dense" and held is not None and can_run(held):
            runs_on = held
            session.clock.view_ready = session.clock.view_ready or time.monotonic()
        elif seat.form != "dense" and not seat.auto:
            runs_on = owner.zeroed(self._views)
        session.view = runs_on
        session.view_bytes = seat.zeroed_bytes + (0 if held is None else held.nbytes)

    def _join_group(self, seat: Seat) -> None:
        group = self._shared.setdefault(seat.key, ExpertGroup(seat.key.shares_with))
        group.members.append(seat)
        group.stale, group.rests = True, False
        seat.group = group

    def _leave_group(self, seat: Seat) -> None:
        group = seat.group
        if group is None:
            return
        seat.group = None
        group.members.remove(seat)
        group.stale, group.rests = True, False
        if not group.members:
            group.drop_view(self._views)
            del self._shared[seat.key]

    def _release(self, seat: Seat) -> None:
        """Releases a session's own view."""
        if seat.view is not None:
            self._views.release(seat.view)
            seat.view = None
            if seat in self._building:
                self._building.remove(seat)
