"""What a snapshot of an engine says of what the engine holds."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Finished, Started, TokensMade
from griffin_core.engine.limits import Limits
from griffin_core.engine.session import State
from griffin_core.engine.task import GenerateTask, PrefillTask, PruningParams
from griffin_core.errors import EngineStopped
from griffin_core.experts.selection import Selection
from griffin_core.model.load import Model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.stopping import StoppingParams
from tests.servers import eventually
from tests.unit.core.engines import Busy, ByHand, Inbox, complete, engine, prefilled, submit


def task(max_tokens: int = 200, **more: object) -> GenerateTask:
    return GenerateTask(
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        **{"prompt": tuple(range(9)), "pruning": PruningParams(density=1.0), **more},
    )


def paused(running: Engine, asked: GenerateTask) -> None:
    """Has a task's session stop after its first tokens, since nobody reads them."""
    _, inbox = submit(running, asked)
    inbox.until(Started)
    inbox.open = False


def test_an_engine_that_was_not_asked_for_anything_holds_nothing(model: Model) -> None:
    limits = Limits(max_sessions=3, session_bytes=1 << 20, idle_bytes=1 << 10)
    with engine(model, limits=limits) as running:
        held = running.snapshot().result(10)
    assert (held.sessions, held.turns, held.handoffs, held.views) == ((), {}, (), ())
    assert (held.scheduler.live, held.scheduler.waiting, held.scheduler.idle) == ((), (), ())
    assert (held.prefills.queued, held.prefills.begun, held.prefills.owning_cache) == (0, 0, 0)
    assert (held.nbytes.limit, held.nbytes.idle_limit) == (1 << 20, 1 << 10)
    assert (held.nbytes.held, held.nbytes.peak, held.nbytes.views) == (0, 0, 0)
    assert sorted(held.free_slots) == [0, 1, 2] and not held.slots_in_use
    assert (held.next_due_s, held.scheduler.turn_s) == (None, None)
    with pytest.raises(FrozenInstanceError):
        held.sessions = ()  # type: ignore[misc]


def test_sessions_are_told_apart_by_where_they_are(model: Model) -> None:
    with engine(model, prefill_source=None, limits=Limits(max_sessions=1)) as running:
        kept, live, queued = task(2, keep=True), task(), task()
        complete(running, kept)
        paused(running, live)
        submit(running, queued)
        again = task(1, continues=kept.turn_id)
        submit(running, again)
        eventually(lambda: running.snapshot().result(10).sessions[1].stalled)
        held = running.snapshot().result(10)
    ids = [each.turn_id for each in (kept, live, queued)]
    assert [each.session_id for each in held.sessions] == ids
    states = [each.state for each in held.sessions]
    assert states == [State.QUEUED, State.DECODE, State.QUEUED]
    assert held.scheduler.live == (live.turn_id,)
    assert held.scheduler.waiting == (queued.turn_id, kept.turn_id)
    assert (held.scheduler.idle, held.scheduler.recalled) == ((), (kept.turn_id,))
    assert held.scheduler.recalled_bytes == held.sessions[0].reserved_kv_bytes > 0
    assert held.turns == {
        again.turn_id: kept.turn_id,
        live.turn_id: live.turn_id,
        queued.turn_id: queued.turn_id,
    }
    assert held.next_due_s is not None and held.next_due_s <= Limits().reader_timeout_s
    first, second, third = held.sessions
    assert (first.cache.tokens, first.cache.capacity) == (10, 10)  # the last token was not run
    assert second.cache.capacity == 209 and third.cache is None
    assert held.nbytes.held == first.cache.nbytes + second.cache.nbytes + held.nbytes.views
    assert sorted([second.slot]) == [0] and held.free_slots == ()
    assert held.session(queued.turn_id) is third and held.session("nobody") is None


def test_a_kept_session_holds_nothing_of_its_turn(model: Model) -> None:
    with engine(model, prefill_source=None) as running:
        kept = task(2, keep=True, pruning=PruningParams(density=0.5))
        made, _ = complete(running, kept)
        (plain,) = running.snapshot().result(10).sessions
        held = running.snapshot(contents=True).result(10)
        (whole,) = held.sessions
    assert (plain.tokens, plain.statistic) == (None, None)
    assert whole.tokens == (*kept.prompt, *made) and whole.total_tokens == 11
    assert whole.statistic.shape == (3, 88) and whole.statistic.dtype == torch.float32
    assert (whole.in_turn, whole.slot, whole.view, whole.form) == (False, None, None, None)
    assert held.scheduler.idle == (kept.turn_id,)
    assert held.scheduler.idle_bytes == whole.reserved_kv_bytes
    assert held.scheduler.turn_s > 0


def test_what_sessions_run_on_is_told(model: Model) -> None:
    with engine(model, prefill_source=None) as running:
        dense = task()
        shared = [
            task(prompt=(n, 7, 9), pruning=PruningParams(density=0.5, sharing="shared"))
            for n in range(2)
        ]
        for each in (dense, *shared):
            paused(running, each)

        seen = [running.snapshot().result(10)]

        def settled() -> bool:
            seen.append(running.snapshot().result(10))
            forms = [each.form for each in seen[-1].sessions]
            return forms == ["dense", "shared", "shared"] and not seen[-1].groups.due

        eventually(settled)
        held = seen[-1]
        one, two, three = held.sessions
        assert two.view == three.view != one.view
        assert one.runs_on is None and two.runs_on is three.runs_on is not None
        (group,) = held.groups.shared
        assert (group.density, group.policy) == (0.5, "topk")
        assert group.members == (two.session_id, three.session_id)
        assert held.groups.sessions == (one.session_id, *group.members)
        (view,) = (each for each in held.views if each.users)
        assert (view.users, view.ready, view.pending) == (1, True, 0)  # the group is its one user
        assert held.nbytes.views >= view.nbytes > 0
        own = task(pruning=PruningParams(density=0.25))
        paused(running, own)
        eventually(lambda: running.snapshot().result(10).sessions[-1].form is not None)
        last = running.snapshot().result(10).sessions[-1]
        assert last.form in ("own", "zeroed")
        assert last.runs_on.digest == last.slim.digest


def test_slots_hold_something_while_a_request_is_not_plain(model: Model) -> None:
    with engine(model, prefill_source=None) as running:
        _, inbox = submit(running, task(sampling=SamplingParams(temperature=1.0)))
        inbox.until(TokensMade)
        held = running.snapshot().result(10)
        assert held.slots_in_use == {held.sessions[0].slot}
        assert isinstance(inbox.until(Finished), Finished)
        assert running.snapshot().result(10).slots_in_use == frozenset()


def test_a_handoff_under_way_says_what_has_come(model: Model) -> None:
    source = ByHand()
    with engine(model, prefill_source=source) as running:
        asked = task()
        submit(running, asked)
        begun = source.next()
        begun.receiver.receive(prefilled(running, begun.task)[0])
        (handoff,) = running.snapshot().result(10).handoffs
    assert (handoff.turn_id, handoff.tokens, handoff.received) == (asked.turn_id, 9, (9, 0, 0))


def test_prefills_are_counted_by_what_they_hold(model: Model) -> None:
    with engine(model) as running:
        inbox = Inbox()
        inbox.open = False
        prefill = PrefillTask(token_ids=tuple(range(20)), selection=Selection(density=0.5))
        running.prefill(prefill, inbox)
        prefills = running.snapshot().result(10).prefills
        assert (prefills.queued, prefills.begun, prefills.owning_cache) == (1, 0, 0)


def test_a_snapshot_is_taken_between_two_steps_and_never_after_the_end(model: Model) -> None:
    with engine(model) as running:
        busy = Busy(running)
        asked = running.snapshot()
        assert not asked.done()
        busy.release()
        assert asked.result(10).sessions == ()
    with pytest.raises(EngineStopped):
        running.snapshot().result(10)
