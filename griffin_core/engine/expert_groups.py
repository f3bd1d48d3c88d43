"""Which experts each session runs on, and in which form.

A ``private`` session runs on what its own prompt chose. ``shared`` sessions of one density and
policy run on one set, chosen from their summed statistics, Σ_i s_i/√S_i (arXiv 2404.01365, section
4.3). ``auto`` sessions run dense unless pruning gains enough of a step's time, and then on whatever
costs least. What costs what was measured at start (``slim.costs``).

Nothing here makes a session wait: until a view is built, and whenever a copy would not pay, a
session runs on all weights, with its activations zeroed outside its set, or dense if it is
``auto``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from griffin_core.backends.base import Layout
from griffin_core.engine.sessions import Session, Sharing, ViewPool
from griffin_core.engine.snapshot import GroupSnapshot, GroupsSnapshot, RunForm
from griffin_core.experts.expert_set import ExpertSet
from griffin_core.experts.selection import PolicyName, Selection, select_experts
from griffin_core.experts.statistic import group_score
from griffin_core.model.decoder import Decoder
from griffin_core.slim.base import RunView
from griffin_core.slim.costs import StepCosts
from griffin_core.slim.views import SlimView, SlimViews, WholeView

STEPS_HELD = 16
"""Steps for which a group keeps its set, and ``auto`` its form."""

SHARE_KEPT = 0.05
"""A group keeps a layer's set while a new choice would change no more than this share of it
(docs/LOG.md has what that costs in quality)."""

LEAST_GAIN, KEPT_GAIN = 0.05, 0.03
"""Shares of a dense step's time: what pruning must gain before ``auto`` takes it up, and below
which it drops it again."""

ABOUT_EQUAL = 1.03
"""Costs within this factor of each other are no reason to change form, nor to share a set."""

Kind = tuple[float, PolicyName]
"""Density and policy: what sessions of one group have in common."""

Form = Literal["own", "shared", "dense"]
"""What a session runs on: its own set, that of its group, or all neurons."""


class Seat:
    """A session in ``ExpertGroups``, and what it holds there.

    Args:
        zeroed_bytes: what it has taken of the budget to run zeroed.
        prunes: whether it runs on fewer experts than all neurons.
    """

    def __init__(self, session: Session, zeroed_bytes: int, *, prunes: bool) -> None:
        self.session = session
        self.zeroed_bytes = zeroed_bytes
        self.prunes = prunes
        self.kind: Kind = (session.selection.density, session.selection.policy)
        self.form: Form = "dense"
        self.group: ExpertGroup | None = None
        self.view: SlimView | None = None
        self._zeroed: WholeView | None = None

    @property
    def experts(self) -> ExpertSet:
        """What its own statistic chose."""
        assert self.session.experts is not None
        return self.session.experts

    @property
    def auto(self) -> bool:
        """Whether its form may change. A score is always of the experts it was asked for."""
        return self.session.sharing == "auto" and self.prunes and self.one_row

    @property
    def one_row(self) -> bool:
        """Whether it mostly runs one token at a time; a copy does not pay for the few steps of
        other sessions."""
        return self.session.work.layout == "gemv"

    def zeroed(self, views: SlimViews) -> WholeView:
        """All weights, zeroed outside its own set."""
        if self._zeroed is None:
            self._zeroed = views.zeroed(self.experts)
        return self._zeroed


class ExpertGroup:
    """Sessions on one expert set. A session that joins starts on the present set. The group chooses
    again at most every ``STEPS_HELD`` steps, keeps the layers that would hardly change, and its one
    view takes over the others."""

    def __init__(self) -> None:
        self.members: list[Seat] = []
        self.stale = True
        """Whether members have come or gone since the set was chosen."""
        self.experts: ExpertSet | None = None
        self.view: SlimView | None = None
        self._zeroed: WholeView | None = None
        self._chosen = self._laid_out = -STEPS_HELD
        self.rests = False
        """Whether nothing is left to do and all members have been told."""

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do."""
        return not self.stale and _runs(self.view) and not (self.view and self.view.pending)

    def chooses(self, step: int) -> bool:
        """Whether it would choose (again) before a step."""
        return self.stale and (self.experts is None or step - self._chosen >= STEPS_HELD)

    def advance(self, decoder: Decoder, views: SlimViews, step: int) -> None:
        """Chooses, if it is time, and sees to the view.

        Args:
            step: number of the step that comes next.

        Raises:
            Exception: its experts cannot be chosen, or its view cannot be built.
        """
        if self.chooses(step):
            # What a first member brings along is its own set; the group's first choice is to come.
            founds = self.experts is None and len(self.members) == 1
            self._choose(decoder, views)
            self._chosen = self._chosen if founds else step
        if self.view is not None and self.view.error is not None:
            raise self.view.error
        self._lay_out(views, step)

    def _choose(self, decoder: Decoder, views: SlimViews) -> None:
        chosen = select_group(decoder, [seat.session for seat in self.members])
        old = self.experts
        self.experts = chosen if old is None else kept_where_alike(old, chosen, SHARE_KEPT)
        self.stale = False
        if self.experts is not old:
            self._zeroed = None
            if self.view is not None:
                views.change(self.view, self.experts)

    def _lay_out(self, views: SlimViews, step: int) -> None:
        """Sees that the view is laid out for as many rows as it is used for."""
        assert self.experts is not None
        alone = len(self.members) == 1
        layout: Layout = "gemv" if alone and self.members[0].one_row else "gemm"
        other = self.view is not None and self.view.layout != layout and views.copies
        # A layout for one row is slow with two; the other way round there is no hurry.
        if other and (layout == "gemm" or step - self._laid_out >= STEPS_HELD):
            self.drop_view(views)
        wanted = not views.copies or not alone or self.members[0].one_row
        if self.view is None and wanted and views.builds:
            self.view = views.acquire(self.experts, layout, own=True)
            self._laid_out = step

    def zeroed(self, views: SlimViews) -> WholeView:
        """All weights, zeroed outside the group's set."""
        if self._zeroed is None:
            assert self.experts is not None
            self._zeroed = views.zeroed(self.experts)
        return self._zeroed

    def drop_view(self, views: SlimViews) -> None:
        """Gives its view back."""
        if self.view is not None:
            views.release(self.view)
            self.view = None


class ExpertGroups:
    """What all sessions of an engine run on. Owned by the engine's thread.

    A session holds at most one view, and a group one in place of its members'; either is only ever
    taken after what it replaces was given back, so what sessions reserve is enough.

    Args:
        costs: of a step.
    """

    def __init__(self, decoder: Decoder, views: SlimViews, costs: StepCosts) -> None:
        self._decoder = decoder
        self._views = views
        self.costs = costs
        self._seats: dict[str, Seat] = {}  # by session id
        self._shared: dict[Kind, ExpertGroup] = {}
        self._building: list[Seat] = []  # whose own view is on its way
        self._failed: list[tuple[Session, Exception]] = []
        self._step = 0
        self._auto_form: Form = "dense"
        self._auto_since = self._copies_since = -STEPS_HELD
        self._copies = False
        self._decide_at: int | None = None

    def pool(self, selection: Selection, sharing: Sharing) -> ViewPool | None:
        """With which sessions a session reserves its view: those of a shared group have one
        together, and of copies there are never more than pay."""
        if not self._views.builds or (sharing != "shared" and not self._views.copies):
            return None
        density = selection.density
        return ViewPool(
            sharing=sharing,
            density=density,
            policy=selection.policy,
            most_views=1 if sharing == "shared" else self.costs.most_copies(density),
        )

    def join(self, session: Session) -> None:
        """A session has its statistic and its own experts, and is to run on some from the next step
        on."""
        assert session.experts is not None
        size = session.reservation.zeroed
        self._views.take_zeroed(size)
        fewer = session.experts.indices.shape[1] < session.experts.ff_width
        seat = Seat(session, size, prunes=fewer and not session.work.chooses)
        self._seats[session.session_id] = seat
        self._decide(self._step + 1)

    def leave(self, session: Session) -> None:
        """A session has ended. Without effect if it has not joined."""
        seat = self._seats.pop(session.session_id, None)
        if seat is None:
            return
        self._leave_group(seat)
        self._release(seat)
        self._views.give_back_zeroed(seat.zeroed_bytes)
        self._failed = [(failed, error) for failed, error in self._failed if failed is not session]
        session.use(None)
        session.view_bytes = 0
        self._decide_at = self._step

    @property
    def due(self) -> bool:
        """Whether ``advance`` has something to do, even without a step to run."""
        decides = self._decide_at is not None and self._decide_at <= self._step
        chooses = any(group.chooses(self._step) for group in self._shared.values())
        return decides or chooses or self._views.building or bool(self._failed)

    def snapshot(self) -> GroupsSnapshot:
        """Which sessions have experts to run on, and in which groups."""
        return GroupsSnapshot(
            sessions=tuple(self._seats),
            shared=tuple(
                GroupSnapshot(
                    density=density,
                    policy=policy,
                    members=tuple(seat.session.session_id for seat in group.members),
                )
                for (density, policy), group in self._shared.items()
            ),
            due=self.due,
        )

    def form_of(self, session: Session) -> RunForm | None:
        """What a session's next step runs on; None before it has joined."""
        seat = self._seats.get(session.session_id)
        if seat is None or session.view is None:
            return None
        if session.view.experts is None:
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
        if self._decide_at is not None and self._step >= self._decide_at:
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
        """Settles every session's form: after sessions came or went, or when a form was held for
        long enough.

        Args:
            step: number of the step that comes next.
        """
        self._decide_at = None
        seats = list(self._seats.values())
        self._decide_auto([seat for seat in seats if seat.auto])
        for seat in seats:
            seat.form = self._form_of(seat)
        self._decide_copies(seats)
        for seat in seats:  # first what is given back, then what is taken
            if seat.form != "shared":
                self._leave_group(seat)
            if not self._wants_view(seat):
                self._release(seat)
        for seat in seats:
            if seat.form == "shared" and seat.group is None:
                self._join_group(seat)
            if self._wants_view(seat) and seat.view is None:
                try:
                    seat.view = self._views.acquire(seat.experts, seat.session.work.layout)
                    self._building.append(seat)
                except Exception as error:  # it must not end whatever session came or went
                    self._failed.append((seat.session, error))
        for group in self._shared.values():
            if group.experts is None:
                try:
                    group.advance(self._decoder, self._views, step)
                except Exception as error:
                    self._failed += [(member.session, error) for member in group.members]
        self._use_all([seat for seat in seats if seat.group is None or seat.group.experts])

    def _use_all(self, seats: Sequence[Seat]) -> None:
        """Lets sessions run on what there is of their forms. One for which that fails is told of by
        the next ``advance``."""
        for seat in list(seats):
            try:
                self._use(seat)
            except Exception as error:
                seat.session.use(None)
                self._failed.append((seat.session, error))

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

    def _decide_auto(self, autos: Sequence[Seat]) -> None:
        """Chooses the form of all ``auto`` sessions by what the step would cost."""
        if not autos:
            self._auto_form, self._auto_since = "dense", -STEPS_HELD
            return
        costs = {form: self._step_s(autos, form) for form in ("dense", "own", "shared")}
        dense, now = costs["dense"], self._auto_form
        best: Form = "own" if costs["own"] <= ABOUT_EQUAL * costs["shared"] else "shared"
        if now != "dense" and costs[now] <= ABOUT_EQUAL * costs[best]:
            best = now
        gain = 1 - costs[best] / dense
        if gain < (LEAST_GAIN if now == "dense" else KEPT_GAIN):
            best = "dense"
        if best == now:
            return
        if self._step - self._auto_since < STEPS_HELD and costs[now] <= dense:
            self._decide_later(self._auto_since)
            return
        self._auto_form, self._auto_since = best, self._step

    def _step_s(self, autos: Sequence[Seat], form: str) -> float:
        """Seconds of a step with all ``auto`` sessions in one form and the others as they are."""
        dense, own, shared = 0, [], Counter[Kind]()
        for seat in self._seats.values():
            of = form if seat.auto else self._form_of(seat)
            if of == "dense":
                dense += 1
            elif of == "own":
                own.append(seat.experts.density)
            else:
                shared[seat.kind] += 1
        groups = [(kind[0], rows) for kind, rows in shared.items()]
        return self.costs.step_s(dense=dense, own=own, shared=groups)

    def _decide_copies(self, seats: Sequence[Seat]) -> None:
        """Whether sessions on their own set have copies of it."""
        if not self._views.copies or not self._views.builds:
            return
        own = [seat.experts.density for seat in seats if seat.form == "own" and seat.one_row]
        pays = self.costs.copies_pay(whole=sum(s.form == "dense" for s in seats), own=own)
        if not own:
            self._copies, self._copies_since = False, -STEPS_HELD
        elif pays and not self._copies and self._step - self._copies_since < STEPS_HELD:
            self._decide_later(self._copies_since)
        elif pays != self._copies:
            self._copies, self._copies_since = pays, -STEPS_HELD if pays else self._step

    def _decide_later(self, since: int) -> None:
        due = since + STEPS_HELD
        self._decide_at = due if self._decide_at is None else min(due, self._decide_at)

    def _wants_view(self, seat: Seat) -> bool:
        if seat.form != "own":
            return False
        return not self._views.copies or (self._copies and seat.one_row)

    def _use(self, seat: Seat) -> None:
        """Lets the session run on what there is of its form."""
        session = seat.session
        owner = seat if seat.group is None else seat.group
        held = owner.view
        runs_on: RunView = self._views.dense
        if seat.form != "dense" and held is not None and _runs(held):
            runs_on = held
            session.clock.view_ready = session.clock.view_ready or time.monotonic()
        elif seat.form != "dense" and not seat.auto:
            runs_on = owner.zeroed(self._views)
        if session.view is not runs_on:
            session.use(runs_on)
        session.view_bytes = seat.zeroed_bytes + (0 if held is None else held.nbytes)

    def _join_group(self, seat: Seat) -> None:
        group = self._shared.setdefault(seat.kind, ExpertGroup())
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
            del self._shared[seat.kind]

    def _release(self, seat: Seat) -> None:
        """Gives the session's own view back."""
        if seat.view is not None:
            self._views.release(seat.view)
            seat.view = None
            if seat in self._building:
                self._building.remove(seat)


@torch.inference_mode()
def select_group(decoder: Decoder, members: Sequence[Session]) -> ExpertSet:
    """The experts of a group: the one session's own, or those of their summed statistics."""
    first = members[0]
    assert first.experts is not None
    if len(members) == 1:
        return first.experts
    score = group_score([session.s2 for session in members if session.s2 is not None])
    indices = select_experts(
        score.square(),  # policies take a statistic's square
        first.selection,
        magnitude=decoder.magnitudes,
    )
    return ExpertSet(ff_width=first.experts.ff_width, indices=indices)


def kept_where_alike(old: ExpertSet, new: ExpertSet, share: float) -> ExpertSet:
    """The new set, but with the old one's experts in layers where no more than this share of them
    would change; the old object if that is all of them."""
    k = old.indices.shape[1]
    indices = new.indices.to(old.indices.device)
    inside = torch.zeros((len(old.layers), old.ff_width), dtype=torch.bool, device=indices.device)
    inside.scatter_(1, old.indices.long(), True)
    gone = k - inside.gather(1, indices.long()).sum(dim=1)
    changes = gone > share * k
    if not changes.any():
        return old
    mixed = torch.where(changes[:, None], indices, old.indices)
    return ExpertSet(ff_width=old.ff_width, indices=mixed)


def _runs(view: SlimView | None) -> bool:
    return view is not None and view.ready and view.error is None
