"""Admission: what may begin, what is refused, and that bytes are never exceeded."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Failed, Finished, Started
from griffin_core.engine.limits import Limits
from griffin_core.engine.reservation import Reservation
from griffin_core.engine.scheduler import Scheduler
from griffin_core.engine.session import Clock, Session, State
from griffin_core.engine.session_table import SessionTable
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.errors import CapacityExhausted, SessionNotFound
from griffin_core.kv.budget import Budget
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from tests.unit.core.engines import Inbox, complete, engine, finish, submit


def task(
    max_tokens: int = 8, prompt: int = 20, density: float = 1.0, **more: object
) -> GenerateTask:
    return GenerateTask(
        prompt=tuple(range(prompt)),
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        pruning=PruningParams(density=density),
        **more,
    )


def kept_bytes(model: Model, tokens: int) -> int:
    """Of a kept session: KV, and the statistics, three float32 for each neuron."""
    spec = model.decoder.spec
    return kv_bytes(spec, torch.float32, tokens) + 12 * len(spec.layers) * spec.intermediate_size


def test_a_request_that_cannot_begin_before_its_deadline_is_refused_at_once(
    model: Model,
) -> None:
    with engine(model, prefill_source=None, limits=Limits(max_sessions=1)) as running:
        complete(running, task(200))  # shows how long a turn takes
        seen = running.snapshot().result(10)
        assert seen.sessions == ()  # and it is noted
        turn_s = seen.scheduler.turn_s
        assert turn_s is not None
        holder = Inbox()
        running.submit(task(200), holder)
        holder.until(Started)
        holder.open = False
        waiting = [submit(running, task())[1] for _ in range(4)]
        hurried = submit(running, task(deadline=time.monotonic() + turn_s))[1]
        refused = hurried.until(Finished)
        assert isinstance(refused.error, CapacityExhausted)
        assert "deadline" in str(refused.error)
        assert refused.error.retry_after_s >= turn_s
        patient = submit(running, task(deadline=time.monotonic() + 60))[1]
        holder.open = True
        running.wake()
        for inbox in (*waiting, patient):
            assert isinstance(finish(inbox)[1], Finished)


def test_a_deadline_is_no_matter_where_there_is_room(model: Model) -> None:
    with engine(model, prefill_source=None) as running:
        complete(running, task(200))
        asked = task(deadline=time.monotonic() + 0.001)
        assert isinstance(finish(submit(running, asked)[1])[1], Finished)


def test_kept_sessions_beyond_the_idle_budget_go_the_longest_idle_first(model: Model) -> None:
    one = kept_bytes(model, 28)
    limits = Limits(idle_bytes=2 * one)
    with engine(model, prefill_source=None, limits=limits) as running:
        kept = [task(keep=True) for _ in range(3)]
        for each in kept:
            assert complete(running, each)[1].kept
        left = [info.session_id for info in running.sessions().result(10)]
        assert left == [each.turn_id for each in kept[1:]]
        again = submit(running, task(continues=kept[0].turn_id))[1].until(Finished)
        assert isinstance(again.error, SessionNotFound)
        assert "evicted: others were kept later" in str(again.error)


def test_a_session_that_is_larger_than_the_idle_budget_is_not_kept(model: Model) -> None:
    limits = Limits(idle_bytes=kept_bytes(model, 27))
    with engine(model, prefill_source=None, limits=limits) as running:
        _, finished = complete(running, task(keep=True))
        assert not finished.kept
        assert running.sessions().result(10) == []


def test_a_kept_session_holds_no_more_than_its_tokens(model: Model) -> None:
    with engine(model, prefill_source=None) as running:
        (first,), _ = complete(running, task(1, density=0.5))
        stopped = GenerateTask(
            prompt=tuple(range(20)),
            stopping=StoppingParams(max_tokens=200, stop_token_ids=frozenset([first])),
            pruning=PruningParams(density=0.5),
            keep=True,
        )
        _, finished = complete(running, stopped)
        (info,) = running.sessions().result(10)
        assert info.context_tokens == 21
        assert info.reserved_bytes == kept_bytes(model, 20)
        (kept,) = running.snapshot().result(10).sessions
        assert not kept.in_turn
        assert kept.slim is None
        assert info.pruning.norm_mass == finished.pruning.norm_mass


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("closed", "it was closed"),
        ("cancelled", "its caller went away"),
        ("never", "it never was"),
        ("not kept", "it was not kept"),
    ],
)
def test_a_session_that_is_not_there_says_what_became_of_it(
    how: str, words: str, model: Model
) -> None:
    with engine(model, prefill_source=None) as running:
        first = task(keep=how == "closed", max_tokens=200)
        if how == "cancelled":
            submit(running, first)
            running.cancel(first.turn_id)
        elif how != "never":
            complete(running, first)
        if how == "closed":
            running.close(first.turn_id).result(10)
        for ask in (running.session, running.close):
            with pytest.raises(SessionNotFound, match=words):
                ask(first.turn_id).result(10)


@pytest.mark.parametrize("sharing", ["private", "shared", "auto"])
def test_a_small_budget_is_never_exceeded(sharing: str, model: Model) -> None:
    """Random sessions, kept, continued, cancelled, in room for three or four."""
    draw = random.Random(5)
    spec = model.decoder.spec
    room = 5 * kv_bytes(spec, torch.float32, 120)
    limits = Limits(session_bytes=room, idle_bytes=room, max_queue=6)
    ends: dict[str, int] = {}
    with engine(model, prefill_source=None, limits=limits, sharing=sharing) as running:
        kept: list[str] = []
        waiting: list[Inbox] = []
        for number in range(150):
            asked = task(
                draw.randrange(1, 60),
                prompt=draw.randrange(1, 60),
                density=draw.choice((1.0, 0.5, 0.25)),
                keep=draw.random() < 0.5,
                continues=draw.choice(kept) if kept and draw.random() < 0.3 else None,
            )
            turn_id, inbox = submit(running, asked)
            waiting.append(inbox)
            if draw.random() < 0.2:
                running.cancel(turn_id)
                waiting.remove(inbox)
            if asked.keep and asked.continues is None:
                kept.append(turn_id)
            if number % 3 == 0 and waiting:
                _, last = finish(waiting.pop(0))
                name = type(last.error if isinstance(last, Failed) else last).__name__
                ends[name] = ends.get(name, 0) + 1
        for inbox in waiting:
            _, last = finish(inbox)
            name = type(last.error if isinstance(last, Failed) else last).__name__
            ends[name] = ends.get(name, 0) + 1
        assert ends["Finished"] > 20
        assert set(ends) <= {
            "Finished",
            "CapacityExhausted",
            "SessionNotFound",
            "SessionBusy",
            "InvalidRequest",
        }, ends
        assert running.peak_bytes <= limits.session_bytes
        check_accounts(running)


def check_accounts(running: Engine) -> None:
    """What the budget says is held is what there is."""
    infos = running.sessions().result(10)
    seen = running.snapshot().result(10)
    caches = sum(s.cache.nbytes for s in seen.sessions if s.cache is not None)
    views = seen.nbytes.views
    assert running.held_bytes == seen.nbytes.held == caches + views
    for info in infos:
        running.close(info.session_id).result(10)
    assert running.held_bytes == views
    assert not any(view.users for view in running.snapshot().result(10).views)


# -- tens of thousands of kept sessions ------------------------------------------------------------


def count_instructions(work: Callable[[], object]) -> int:
    """How many instructions of Python a call comes to: a loop over sessions shows, however it is
    written and however fast the machine is."""
    instructions = 0

    def note(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal instructions
        frame.f_trace_opcodes = True
        instructions += event == "opcode"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        work()
    finally:
        sys.settrace(before)
    return instructions


def many_kept(count: int, live: int = 4) -> tuple[Scheduler, SessionTable, Budget]:
    """A scheduler of so many kept sessions of 10 bytes, and some that run."""
    budget = Budget(limit=11 * 10**6, idle_limit=10 * count)
    limits = Limits(session_ttl_s=1e9)
    table = SessionTable()
    scheduler = Scheduler(limits, table, budget, lambda session: None, _never)
    for number in range(count + live):
        begin(scheduler, Session(f"session {number}"))
        if number < count:
            scheduler.keep(scheduler.live[0], 10)
    return scheduler, table, budget


def _never(session: Session, error: CapacityExhausted) -> None:
    raise AssertionError(f"{session.session_id} was refused: {error}")


def begin(scheduler: Scheduler, session: Session) -> None:
    """Has a session's turn admitted."""
    session.clock = Clock(arrived=time.monotonic(), last_token=time.monotonic())
    scheduler.enqueue(session, Reservation(kv=100), None)
    assert scheduler.admit() == [session]


def turns(scheduler: Scheduler, table: SessionTable, budget: Budget) -> dict[str, int]:
    """Instructions of each thing that an engine does with its sessions."""
    kept = table.find("session 2")
    fresh = Session("new")

    def whole_life() -> None:
        begin(scheduler, fresh)
        scheduler.keep(fresh, 10)  # and the longest idle gives way

    def lack_of_memory() -> None:
        budget.limit = 500 + 10 * (len(table) - 8)
        begin(scheduler, Session("another"))

    works: dict[str, Callable[[], object]] = {
        "tick": lambda: (scheduler.expire(), scheduler.admit(), scheduler.deadlocked()),
        "due": scheduler.next_expiry_s,
        "find": lambda: (table.find("session 5"), table.closed_reason("nobody")),
        "next turn": lambda: (begin(scheduler, kept), scheduler.keep(kept, 10)),
        "new session": whole_life,
        "page": lambda: table.page(table.page(0, 2)[-1].number, 2),
        "states": scheduler.states,
        "close": lambda: scheduler.drop(kept, "closed"),
        "memory": lack_of_memory,
    }
    return {name: count_instructions(work) for name, work in works.items()}


def test_no_turn_of_the_engine_takes_longer_the_more_sessions_are_kept() -> None:
    few, many = turns(*many_kept(10)), turns(*many_kept(2000))
    for name, instructions in many.items():
        # Searches by halves, one in an owner's sessions and one in all, look at seven sessions more
        # each; a walk would look at 1990.
        assert instructions <= few[name] + 200, name


def test_running_sums_are_the_sums_after_anything() -> None:
    """Random turns, kept, continued, closed, evicted: the scheduler's sums are those of its
    sessions."""
    draw = random.Random(3)
    budget = Budget(limit=1000, idle_limit=400)
    freed: list[Session] = []
    table = SessionTable()
    scheduler = Scheduler(Limits(max_sessions=4, max_queue=6), table, budget, freed.append, _never)
    for number in range(3000):
        everyone = list(table)
        done = draw.random()
        if done < 0.3 or not everyone:
            session = Session(f"session {number}")
        else:
            session = draw.choice(everyone)
        session.clock = Clock(arrived=0.0, last_token=time.monotonic())
        if session in scheduler.live:
            if draw.random() < 0.7:
                scheduler.keep(session, draw.randrange(1, 60))
            else:
                scheduler.drop(session, "its turn ended")
        elif done > 0.9:
            scheduler.drop(session, "it was closed")
        elif session.state is State.IDLE or session not in everyone:
            with contextlib.suppress(CapacityExhausted):
                scheduler.enqueue(session, Reservation(kv=draw.randrange(60, 500)), None)
        scheduler.admit()
        if stuck := scheduler.deadlocked():
            scheduler.drop(stuck, "it gave way")
        everyone = list(table)
        numbers = [each.number for each in everyone]
        assert numbers == sorted(set(numbers))
        by_state = Counter(each.state for each in everyone)
        assert +scheduler.states() == +by_state
        idle = [each for each in everyone if each.state is State.IDLE]
        seen = scheduler.snapshot()
        recalled = [e for e in everyone if e.session_id in seen.recalled]
        assert len(recalled) == len(seen.recalled)
        assert seen.idle_bytes == sum(each.reservation.kv for each in idle)
        assert seen.recalled_bytes == sum(each.reservation.kv for each in recalled)
        assert all(each.state is State.QUEUED for each in recalled)
        running = sum(each.reservation.kv for each in scheduler.live)
        assert running + seen.idle_bytes + seen.recalled_bytes <= budget.limit
        assert seen.idle_bytes <= budget.idle_limit
    assert len(freed) > 100


def test_pages_are_all_sessions_once_whatever_comes_and_goes_between_them(model: Model) -> None:
    with engine(model, prefill_source=None) as running:
        kept = [task(1, prompt=2, keep=True) for _ in range(7)]
        for each in kept:
            complete(running, each)
        first = running.session_page(most=3).result(10)
        assert [info.session_id for info in first.sessions] == [e.turn_id for e in kept[:3]]
        assert first.total == 7
        # The end of the page goes, one of the next page, too, and another one comes.
        running.close(kept[2].turn_id).result(10)
        running.close(kept[4].turn_id).result(10)
        kept.append(task(1, prompt=2, keep=True))
        complete(running, kept[-1])
        complete(running, task(1, prompt=2, continues=kept[0].turn_id, keep=True))
        second = running.session_page(after=first.last, most=3).result(10)
        left = [each.turn_id for index, each in enumerate(kept) if index in (3, 5, 6)]
        assert [info.session_id for info in second.sessions] == left
        assert second.total == 6
        third = running.session_page(after=second.last, most=3).result(10)
        assert [info.session_id for info in third.sessions] == [kept[-1].turn_id]
        assert third.last is None
        whole = running.session_page(most=6).result(10)
        assert whole.last is None
        assert [info.session_id for info in whole.sessions] == [
            info.session_id for info in running.sessions().result(10)
        ]
