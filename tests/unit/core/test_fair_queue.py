"""Owners take turns: whoever sends many requests does not keep out those who send few."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from griffin_core.engine.events import Failed, Finished, Started
from griffin_core.engine.limits import Limits
from griffin_core.engine.reservation import Reservation
from griffin_core.engine.scheduler import MOST_OVERTAKEN, MOST_TRIED, Scheduler
from griffin_core.engine.session import Clock, Session
from griffin_core.engine.session_table import SessionTable
from griffin_core.engine.task import GenerateTask
from griffin_core.engine.waiting import WaitingSessions
from griffin_core.errors import CapacityExhausted, SessionNotFound
from griffin_core.kv.budget import Budget
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from tests.unit.core.engines import Inbox, engine, submit


def session(name: str) -> Session:
    """ "a1" is a session of the owner "a"."""
    made = Session(name, owner=name[0])
    made.clock = Clock(arrived=0.0)
    return made


def names(sessions: Any) -> list[str]:
    return [one.session_id for one in sessions]


class Counted(Budget):
    """Counts how often its limit is read."""

    read = 0

    @property
    def limit(self) -> int:  # type: ignore[override]
        self.read += 1
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        self._limit = value


class Desk:
    """A scheduler, and what it refuses."""

    def __init__(self, *, budget: int = 1000, **limits: float) -> None:
        self.table = SessionTable()
        self.refused: dict[str, CapacityExhausted] = {}
        self.budget = Counted(limit=budget, idle_limit=budget)
        self.scheduler = Scheduler(
            Limits(**limits),  # type: ignore[arg-type]
            self.table,
            self.budget,
            lambda session: None,
            self._refuse,
        )

    def _refuse(self, session: Session, error: CapacityExhausted) -> None:
        self.refused[session.session_id] = error
        self.scheduler.drop(session, "refused")

    def ask(self, *sessions: str, kv: int = 1, deadline: float | None = None) -> None:
        for name in sessions:
            self.scheduler.enqueue(session(name), Reservation(kv=kv), deadline)

    def end_well(self, name: str) -> None:
        """Ends a turn so that its length counts."""
        self.table.find(name).clock.prefilled = 1.0
        self.end(name)

    def kept(self, owner: str) -> int:
        return sum(name[0] == owner for name in self.scheduler.snapshot().idle)

    def begin(self) -> list[str]:
        return names(self.scheduler.admit())

    def end(self, *sessions: str) -> None:
        for name in sessions:
            self.scheduler.drop(self.table.find(name), "done")


def test_owners_take_turns() -> None:
    waiting = WaitingSessions()
    everyone = {name: session(name) for name in ("a1", "a2", "a3", "b1", "c1", "b2")}
    for one in everyone.values():
        waiting.add(one)
    assert names(waiting) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert (len(waiting), waiting.count("a"), waiting.count("nobody")) == (6, 3, 0)
    assert [waiting.ahead_of_next(owner) for owner in "abcd"] == [6, 6, 5, 3]
    begun = []
    while len(waiting):
        first = next(iter(waiting))
        waiting.take(first)
        begun.append(first.session_id)
    assert begun == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert names(waiting) == []


def test_the_queue_keeps_count_whatever_comes_and_goes() -> None:
    draw, waiting, there = random.Random(1), WaitingSessions(), dict[str, Session]()
    for number in range(2000):
        if draw.random() < 0.55:
            made = session(f"{draw.choice('abc')}{number}")
            waiting.add(made)
            there[made.session_id] = made
        elif there:
            gone = there.pop(draw.choice(list(there)))
            draw.choice((waiting.take, waiting.discard))(gone)
            waiting.discard(gone)
        assert len(waiting) == len(there) and set(names(waiting)) == set(there)
        for owner in "abc":
            assert waiting.count(owner) == sum(name[0] == owner for name in there)


def test_a_full_queue_has_room_for_another_owner() -> None:
    desk = Desk(max_sessions=1, max_queue=4)
    desk.ask("a0")
    assert desk.begin() == ["a0"]
    desk.ask("a1", "a2", "a3", "a4")
    with pytest.raises(CapacityExhausted, match="4 requests wait already"):
        desk.ask("a5")
    desk.ask("b1")
    assert list(desk.refused) == ["a4"]
    assert desk.refused["a4"].retry_after_s is not None
    desk.ask("b2")
    assert list(desk.refused) == ["a4", "a3"]
    with pytest.raises(CapacityExhausted):  # both have as many
        desk.ask("b3")
    desk.end("a0")
    assert desk.begin() == ["a1"]
    desk.end("a1")
    assert desk.begin() == ["b1"]


def test_a_kept_sessions_turn_is_not_refused_for_others() -> None:
    desk = Desk(max_sessions=1, max_queue=3)
    desk.ask("a0")
    desk.begin()
    kept = desk.table.find("a0")
    desk.scheduler.keep(kept, 1)
    desk.ask("a1")
    desk.begin()
    desk.ask("a2", "a3")
    desk.scheduler.enqueue(kept, Reservation(kv=2), None)  # the youngest
    desk.ask("b1")
    assert list(desk.refused) == ["a3"]


def test_an_owner_runs_so_many_sessions_and_leaves_room_for_others() -> None:
    desk = Desk(max_sessions=4, max_owner_sessions=3, max_queue=100)
    desk.ask(*(f"a{n}" for n in range(10)))
    assert desk.begin() == ["a0", "a1", "a2"]
    desk.ask("b0", "b1")
    assert desk.begin() == ["b0"]
    desk.end("b0")
    assert desk.begin() == ["b1"]
    desk.end("b1")
    assert desk.begin() == []
    desk.end("a1")
    assert desk.begin() == ["a3"]


def test_what_does_not_fit_is_overtaken_so_often_and_no_oftener() -> None:
    desk = Desk(budget=100, max_sessions=10, max_queue=1000)
    desk.ask("a0", kv=60)
    assert desk.begin() == ["a0"]
    desk.ask("b0", kv=90)
    small = [f"c{n}" for n in range(MOST_OVERTAKEN + 4)]
    begun = []
    for name in small:
        desk.ask(name, kv=10)
        now = desk.begin()
        begun += now
        desk.end(*now)
    assert begun == small[:MOST_OVERTAKEN]
    desk.end("a0")
    assert desk.begin() == ["b0", small[MOST_OVERTAKEN]]


def test_one_owner_alone_is_served_in_order_of_arrival() -> None:
    desk = Desk(max_sessions=1, max_queue=100)
    asked = [f"a{n}" for n in range(20)]
    desk.ask(*asked)
    begun = []
    for _ in asked:
        now = desk.begin()
        begun += now
        desk.end(*now)
    assert begun == asked


def test_kept_sessions_turns_do_not_keep_out_another_owner() -> None:
    desk = Desk(max_sessions=4, max_owner_sessions=3, max_queue=4)
    kept = [f"a{n}" for n in range(7)]
    for name in kept:
        desk.ask(name)
        desk.begin()
        desk.scheduler.keep(desk.table.find(name), 1)
    for name in kept:
        desk.scheduler.enqueue(desk.table.find(name), Reservation(kv=2), None)
        desk.begin()
    desk.ask("b0")  # there is a free place, and whoever waits runs as many as it may
    assert desk.begin() == ["b0"] and not desk.refused
    desk.ask("b1")
    assert list(desk.refused) == ["a6"]


def test_a_request_that_is_refused_costs_nobody_a_place() -> None:
    desk = Desk(max_sessions=1, max_queue=3)
    desk.ask("a0")
    desk.begin()
    desk.table.find("a0").clock.admitted = time.monotonic() - 1000
    desk.end_well("a0")  # a turn takes long
    desk.ask("a1")
    desk.begin()
    desk.ask("a2", "a3", "a4")
    with pytest.raises(CapacityExhausted, match="after its deadline"):
        desk.ask("b0", deadline=time.monotonic() + 1)
    assert not desk.refused


def test_a_deadline_is_compared_with_what_comes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with what waits for its own owner's sessions to end."""
    desk = Desk(max_sessions=3, max_owner_sessions=1, max_queue=10)
    desk.ask("a0")
    desk.begin()
    desk.table.find("a0").clock.admitted = time.monotonic() - 1000
    desk.end_well("a0")
    desk.ask("a1", "a2")
    assert desk.begin() == ["a1"]
    desk.ask("b0", deadline=time.monotonic() + 1)
    assert desk.begin() == ["b0"]
    with pytest.raises(CapacityExhausted, match="with 1 requests ahead"):
        desk.ask("a3", deadline=time.monotonic() + 1)


def test_a_full_server_looks_at_its_queue_once() -> None:
    """``admit`` runs with each step."""
    desk = Desk(budget=100, max_sessions=100, max_queue=1000)
    desk.ask("a0", kv=60)
    desk.begin()
    desk.ask(*(f"b{n}" for n in range(200)), kv=90)
    desk.budget.read = 0
    for _ in range(100):
        assert desk.begin() == []
    assert desk.budget.read <= MOST_TRIED
    desk.end("a0")
    assert desk.begin() == ["b0"]


def test_an_owner_over_its_share_of_memory_waits_for_itself_and_nobody_for_it() -> None:
    desk = Desk(budget=100, max_sessions=100, max_queue=1000, owner_share=0.5)
    desk.ask("a0", "a1", kv=25)
    desk.ask("a2", kv=25)
    assert desk.begin() == ["a0", "a1"]
    for number in range(3 * MOST_OVERTAKEN):
        desk.ask(f"b{number}", kv=10)
        assert desk.begin() == [f"b{number}"]
        desk.end(f"b{number}")
    with pytest.raises(CapacityExhausted, match="allows a caller 50 in all"):
        desk.ask("b", kv=51)
    desk.end("a0")
    assert desk.begin() == ["a2"]


def test_an_owner_has_so_many_waiting_and_no_more() -> None:
    desk = Desk(max_sessions=1, max_queue=100, max_owner_queue=2)
    desk.ask("a0")
    desk.begin()
    desk.ask("a1", "a2")
    with pytest.raises(CapacityExhausted, match="2 of your requests wait already") as refused:
        desk.ask("a3")
    assert refused.value.retry_after_s
    desk.ask("b0", "b1")


def test_the_owner_that_keeps_the_most_loses_its_oldest_session() -> None:
    desk = Desk(budget=1000, max_sessions=10, max_queue=100)
    desk.budget.idle_limit = 100
    desk.ask("b0", *(f"a{number}" for number in range(8)), kv=10)
    desk.begin()
    for name in ("b0", *(f"a{number}" for number in range(8))):
        desk.table.find(name).clock.last_token = time.monotonic()
        desk.scheduler.keep(desk.table.find(name), 10)
    assert [desk.kept("a"), desk.kept("b")] == [8, 1]
    desk.ask("c0", "c1", "c2", kv=10)
    desk.begin()
    for name in ("c0", "c1", "c2"):
        desk.scheduler.keep(desk.table.find(name), 10)
    assert [desk.kept("a"), desk.kept("b"), desk.kept("c")] == [6, 1, 3]  # b0 was there first
    with pytest.raises(SessionNotFound, match="others were kept later"):
        desk.table.find("a0")
    desk.ask("d0", kv=950)
    assert desk.begin() == ["d0"]
    assert [desk.kept("a"), desk.kept("b"), desk.kept("c")] == [2, 1, 2]


def task(owner: str, tokens: int) -> GenerateTask:
    return GenerateTask(
        prompt=(1, 2, 3),
        stopping=StoppingParams(max_tokens=tokens, ignore_eos=True),
        owner=owner,
    )


def test_a_flood_of_one_owner_leaves_room_for_another(model: Model) -> None:
    limits = Limits(max_sessions=4, max_owner_sessions=3, max_queue=50)
    with engine(model, prefill_source=None, limits=limits) as running:
        flood = [submit(running, task("many", 100))[1] for _ in range(300)]
        mine = submit(running, task("few", 4))[1]
        assert isinstance(mine.until(Started), Started)
        assert isinstance(mine.until(Finished), Finished)
        assert sum(ended(inbox) is None for inbox in flood) > 30  # most of them still wait
        ends = [inbox.until(Finished) for inbox in flood if ended(inbox) is None]
        assert all(isinstance(end, Finished) for end in ends)
        refused = [end for inbox in flood if isinstance(end := ended(inbox), Failed)]
        assert all(isinstance(end.error, CapacityExhausted) for end in refused)
        assert 200 < len(refused) < 300


def ended(inbox: Inbox) -> Any:
    """A last event that has come; None if there is none."""
    return next((e for e in list(inbox.events.queue) if isinstance(e, Finished | Failed)), None)
