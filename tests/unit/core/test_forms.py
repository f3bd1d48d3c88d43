"""Which form each session runs in: by what steps cost, without a wait, and held for a while.

Sessions are stood in for by what ``ExpertGroups`` reads of one, so that a test counts the steps.
"""

from __future__ import annotations

import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from griffin_core.engine import expert_group as sharing
from griffin_core.engine.expert_group import STEPS_HELD, kept_where_alike, select_group
from griffin_core.engine.expert_groups import ExpertGroups
from griffin_core.engine.reservation import Reservation
from griffin_core.engine.session import Clock, Session
from griffin_core.experts.selection import Selection, select_experts
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics
from griffin_core.kv.budget import Budget
from griffin_core.model.load import Model
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.costs import BlockCosts
from griffin_core.slim.packed import Packed
from griffin_core.slim.views import SlimView, SlimViews, WholeView
from griffin_core.slim.zeroed import ZeroedLayers
from griffin_core.spec.choices import Sharing

F, L = 88, 3


def flat(rest: float = 0.5, half: float = 0.5) -> BlockCosts:
    """A dense FF takes 1 s for any number of sessions."""
    rows = (1, 2, 4, 8, 16)
    return BlockCosts(
        rest=dict.fromkeys(rows, rest),
        dense=dict.fromkeys(rows, 1.0),
        half=dict.fromkeys(rows, half),
    )


class House:
    """Expert groups with room for what their sessions have reserved, and no more."""

    def __init__(self, model: Model, costs: BlockCosts | None = None) -> None:
        self.budget = Budget(0)
        self.views = SlimViews(model.decoder, BlockTable(model.decoder), Packed(), self.budget)
        self.groups = ExpertGroups(model.decoder, self.views, costs or flat())
        self.sessions: list[Session] = []
        self._model = model

    def add(
        self, seed: int, how: Sharing, density: float = 0.5, *, s2: torch.Tensor | None = None
    ) -> Session:
        """A session with a statistic of its own joins."""
        session = Session(f"{seed}")
        session.selection = Selection(density=density)
        session.sharing = how
        session.turn = cast(Any, SimpleNamespace(layout="gemv", chooses=False))
        session.clock = Clock()
        if s2 is None:
            s2 = torch.rand((L, F), generator=torch.Generator().manual_seed(seed))
        session.statistics = Statistics.of_score(s2)
        magnitude = self._model.decoder.magnitudes
        session.slim = select_experts(s2, session.selection, magnitude=magnitude)
        k = session.selection.most_counts(L, F)
        session.reservation = Reservation(
            kv=0,
            zeroed=self.views.zeroed_bytes(k),
            view=self.views.planned_bytes(k),
            pool=self.groups.pool(session.selection, how),
        )
        self.sessions.append(session)
        self.reserve()
        self.groups.join(session)
        return session

    def remove(self, session: Session) -> None:
        """A session ends."""
        self.groups.leave(session)
        self.sessions.remove(session)
        self.reserve()

    def step(self, steps: int = 1, build: bool = True) -> None:
        """What an engine does before each step."""
        for _ in range(steps):
            if build:
                self.views.build(60.0)
            assert self.groups.advance() == []
            assert all(session.view is not None for session in self.sessions)

    def reserve(self) -> None:
        """As ``Scheduler`` counts."""
        pools: dict[object, list[Reservation]] = {}
        total = 0
        for session in self.sessions:
            needs = session.reservation
            total += needs.zeroed + (0 if needs.pool else needs.view)
            if needs.pool is not None:
                pools.setdefault(needs.pool, []).append(needs)
        for of in pools.values():
            assert of[0].pool is not None
            total += min(len(of), of[0].pool.max_views) * of[0].view
        self.budget.limit = total
        self.budget.acquire(0)  # what is unused gives way, and the rest fits


def form(session: Session) -> str:
    """What a session runs on."""
    if isinstance(session.view, SlimView):
        return "slim"
    assert isinstance(session.view, WholeView)
    return "zeroed" if isinstance(session.view.layers, ZeroedLayers) else "dense"


def forms(house: House) -> list[str]:
    return [form(session) for session in house.sessions]


def test_private_sessions_run_zeroed_until_their_copy_is_built_and_never_wait(model: Model) -> None:
    house = House(model)
    session = house.add(1, "private")
    assert form(session) == "zeroed" and session.view.slim is session.slim
    house.step(build=False)
    assert form(session) == "zeroed"
    house.step()
    assert form(session) == "slim" and session.view.slim.digest == session.slim.digest


def test_more_private_sessions_than_copies_pay_for_all_run_zeroed(model: Model) -> None:
    house = House(model)
    for seed in range(2):
        house.add(seed, "private")
    house.step()
    assert forms(house) == ["slim"] * 2  # two halves are no more than a whole
    house.add(2, "private")
    assert forms(house) == ["zeroed"] * 3
    assert not any(view.users for view in house.views.held)
    house.remove(house.sessions[0])
    house.step(STEPS_HELD - 1)
    assert forms(house) == ["zeroed"] * 2  # it does not flap
    house.step(3)
    assert forms(house) == ["slim"] * 2


def test_all_neurons_run_dense_and_hold_nothing(model: Model) -> None:
    house = House(model)
    for how in ("private", "shared", "auto"):
        house.add(1, how, 1.0)
    assert forms(house) == ["dense"] * 3
    assert house.budget.held == 0


def test_a_session_that_joins_a_group_starts_on_its_present_set_and_counts_within_16_steps(
    model: Model,
) -> None:
    house = House(model)
    first = house.add(1, "shared")
    house.step(3)
    second = house.add(2, "shared")
    assert second.view.slim.digest == first.slim.digest
    house.step()
    assert second.view.slim.digest == select_group(model.decoder, [first, second]).digest
    third, present = house.add(3, "shared"), first.view.slim.digest
    assert third.view.slim.digest == present
    both = select_group(model.decoder, [first, second, third])
    house.step(STEPS_HELD - 2)
    assert third.view.slim.digest == present
    for _ in range(STEPS_HELD):
        house.step()
        assert first.view.slim.digest == second.view.slim.digest
    assert first.view.slim.digest == both.digest
    assert form(first) == "slim" and first.view is second.view


def test_a_group_chooses_at_most_once_in_16_steps(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(model)
    chosen_at: list[int] = []
    step = 0

    def select(decoder: Any, members: Any) -> SlimSpec:
        chosen_at.append(step)
        return select_group(decoder, members)

    monkeypatch.setattr(sharing, "select_group", select)
    for step in range(100):
        if step % 3 == 0:
            house.add(step, "shared")
        if step % 7 == 0 and len(house.sessions) > 1:
            house.remove(house.sessions[0])
        house.step()
    assert len(chosen_at) >= 6
    chosen_at.pop(0)  # of the first member alone: its own set
    assert all(later - one >= STEPS_HELD for one, later in pairwise(chosen_at))


def test_a_group_keeps_its_view_when_its_set_changes_and_the_set_when_it_hardly_would(
    model: Model,
) -> None:
    house = House(model)
    first, second = house.add(1, "shared"), house.add(2, "shared")
    house.step(3 * STEPS_HELD)
    view, layers, experts = first.view, list(first.view.layers), first.view.slim
    same = house.add(3, "shared", s2=first.statistics.s2 + second.statistics.s2)
    house.step(2 * STEPS_HELD)
    assert same.view is view and view.slim is experts
    assert all(one is other for one, other in zip(view.layers, layers, strict=True))
    house.add(4, "shared", s2=torch.rand((L, F)) ** 8)
    house.step(2 * STEPS_HELD)
    assert first.view is view and view.slim is not experts
    assert not house.views.building


def test_sessions_run_on_while_a_view_changes_layer_by_layer(model: Model) -> None:
    house = House(model)
    first = house.add(1, "shared")
    house.add(2, "shared")
    house.step(2 * STEPS_HELD)
    before = list(first.view.layers)
    house.add(3, "shared", s2=torch.rand((L, F)) ** 8)
    house.groups.advance()
    while not house.views.building:
        house.step(build=False)
    changed = []
    while house.views.building:
        house.views.build(0.0)
        assert house.groups.advance() == [] and form(first) == "slim"
        changed.append(sum(a is not b for a, b in zip(first.view.layers, before, strict=True)))
    assert changed == sorted(changed) and 1 <= changed[-1] <= L


def test_a_layer_is_kept_unless_more_than_the_share_of_it_would_change() -> None:
    old = SlimSpec.of_layers(F, torch.arange(20, dtype=torch.int32).expand(L, -1))
    new = old.table.clone()
    new[1, -1] = 50  # one of 20
    new[2, -2:] = torch.tensor([50, 51], dtype=torch.int32)
    changed = SlimSpec.of_layers(F, new.unbind())
    kept = kept_where_alike(old, changed, 0.05)
    assert torch.equal(kept.table[:2], old.table[:2]) and torch.equal(kept.table[2], new[2])
    assert kept_where_alike(old, changed, 0.1) is old


def test_auto_runs_dense_unless_pruning_gains_a_twentieth_of_a_step(model: Model) -> None:
    for half, expected in ((0.93, "dense"), (0.91, "slim")):  # of 1.5 s, 0.07 and 0.09
        house = House(model, flat(half=half))
        house.add(1, "auto")
        house.step(2)
        assert forms(house) == [expected]


def test_auto_is_private_while_that_pays_then_shared(model: Model) -> None:
    house = House(model, flat(half=0.45))
    first, second = house.add(1, "auto"), house.add(2, "auto")
    house.step(STEPS_HELD + 2)
    # By bytes one set for both costs half of two; no other form is within 3 % of it.
    assert first.view is second.view and form(first) == "slim"
    house.remove(second)
    house.step(2 * STEPS_HELD + 2)
    assert form(first) == "slim" and first.view.slim.digest == first.slim.digest


def test_auto_runs_dense_until_its_view_is_built(model: Model) -> None:
    house = House(model)
    session = house.add(1, "auto")
    assert form(session) == "dense" and session.density == 1.0
    house.step()
    assert form(session) == "slim" and session.density == 0.5


def test_auto_holds_its_form_but_never_while_that_is_slower_than_dense(model: Model) -> None:
    rows = (1, 2, 4)
    costs = BlockCosts(
        rest=dict.fromkeys(rows, 0.0),
        dense={1: 1.0, 2: 1.0, 4: 1.0},
        half={1: 0.5, 2: 1.2, 4: 1.2},  # neither two private sets nor one shared one pay
    )
    house = House(model, costs)
    house.add(1, "auto")
    house.step(2)
    assert forms(house) == ["slim"]
    house.add(2, "auto", 0.9)
    assert forms(house) == ["dense"] * 2  # at once
    house.remove(house.sessions[1])
    house.step(STEPS_HELD - 2)
    assert forms(house) == ["dense"]  # held
    house.step(4)
    assert forms(house) == ["slim"]


def test_a_score_is_never_made_dense_by_auto(model: Model) -> None:
    house = House(model)
    session = house.add(1, "auto")
    house.remove(session)
    session.turn = cast(Any, SimpleNamespace(layout="gemm", chooses=False))
    house.sessions.append(session)
    house.reserve()
    house.groups.join(session)
    house.step(3)
    assert form(session) == "zeroed" and session.view.slim is session.slim


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_and_goes_no_more_is_held_than_was_reserved(seed: int, model: Model) -> None:
    """``Budget.take`` raises if it were."""
    draw = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=draw))

    costs = BlockCosts(
        rest={1: 0.2, 16: 0.8},
        dense={1: 1.0, 4: 1.2, 16: 2.0},
        half={1: 0.5, 2: 0.6, 16: 1.2},
    )
    house = House(model, costs)
    for number in range(300):
        if len(house.sessions) < 8 and below(3) == 0:
            how = (("private", "shared", "auto") * 2)[below(6)]
            house.add(number, cast(Sharing, how), (0.25, 0.5, 1.0)[below(3)])
        if house.sessions and below(5) == 0:
            house.remove(house.sessions[below(len(house.sessions))])
        house.step(build=below(2) == 0)
        assert house.budget.held <= house.budget.limit
        for session in house.sessions:
            if session.sharing == "private" and session.density < 1:
                assert session.view.slim.digest == session.slim.digest
    for session in list(house.sessions):
        house.remove(session)
    assert not any(view.users for view in house.views.held)
    assert house.budget.held == sum(view.nbytes for view in house.views.held)


def test_deciding_for_32_sessions_takes_far_less_than_a_step(model: Model) -> None:
    house = House(model)
    for seed in range(32):
        house.add(seed, "auto")
    house.step(2 * STEPS_HELD)
    clock = time.perf_counter()
    for _ in range(100):
        house.groups.advance()
    assert (time.perf_counter() - clock) / 100 < 1e-3
