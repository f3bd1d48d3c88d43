"""When something inside fails, it costs the sessions it hits and nothing else: no other session, no
byte, no token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from griffin_core.engine import expert_group as sharing
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Failed, Finished, Scored, Started, TokensMade
from griffin_core.engine.expert_groups import ExpertGroups
from griffin_core.engine.limits import Limits
from griffin_core.engine.memory import SessionMemory
from griffin_core.engine.prefill_queue import PrefillQueue
from griffin_core.engine.prefill_run import PrefillRun
from griffin_core.engine.scheduler import Scheduler
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.errors import EngineFault, NonFiniteLogits, SessionNotFound
from griffin_core.forward.decode import Draw
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool, kv_bytes
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.slim import views
from griffin_core.slim.packed import Packed
from griffin_core.spec.choices import Sharing
from tests.servers import eventually
from tests.unit.core.engines import Busy, Inbox, at_baseline, complete, engine, finish, submit


def task(max_tokens: int = 30, first: int = 1, **more: object) -> GenerateTask:
    return GenerateTask(
        prompt=tuple(range(first, first + 9)),
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        **{"pruning": PruningParams(density=0.5), **more},
    )


class Once:
    """Makes a method fail the first time that a condition holds."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, when: Callable[..., bool]
    ) -> None:
        self.failed = False
        whole = getattr(owner, name)

        def method(*arguments: object, **named: object) -> object:
            if not self.failed and when(*arguments, **named):
                self.failed = True
                raise MemoryError("no memory, this once")
            return whole(*arguments, **named)

        monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize("how", ["private", "shared"])
def test_a_view_that_cannot_be_built_ends_its_own_sessions_alone(
    how: Sharing, running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bystander = submit(running, task(200))[1]
    for _ in range(2):  # the second runs on its experts
        bystander.until(TokensMade)
    eventually(lambda: not running.snapshot().result(10).groups.due)
    once = Once(monkeypatch, Packed, "build", lambda *_: True)
    pruning = PruningParams(density=0.5, sharing=how)
    hit = submit(running, task(first=50, pruning=pruning))[1].until(Finished)
    assert once.failed
    assert isinstance(hit.error, EngineFault) and "no memory" in str(hit.error)
    assert len(finish(bystander)[0]) == 198  # and the two that were waited for
    assert isinstance(complete(running, task(first=50, pruning=pruning))[1], Finished)
    eventually(lambda: at_baseline(running))


def test_a_choice_that_fails_when_a_member_leaves_ends_the_group_alone(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bystander = submit(running, task(200))[1]
    shared = PruningParams(density=0.5, sharing="shared")
    turns = [submit(running, task(200, first=40 * n, pruning=shared)) for n in range(3)]
    for _, inbox in turns:
        inbox.until(Started)
        inbox.open = False
    eventually(lambda: not running.snapshot().result(10).groups.due)
    monkeypatch.setattr(sharing, "STEPS_HELD", 0)
    Once(monkeypatch, sharing, "select_group", lambda _, members: len(members) == 2)
    running.cancel(turns[0][0])
    for _, inbox in turns[1:]:
        assert isinstance(inbox.until(Finished).error, EngineFault)
    assert isinstance(finish(bystander)[1], Finished)
    eventually(lambda: at_baseline(running))


@pytest.mark.parametrize(
    ("what", "owner", "name"),
    [
        ("kept turn", KvCache, "resize"),
        ("kept turn", ExpertGroups, "leave"),
        ("kept turn", Scheduler, "keep"),
        ("turn", ExpertGroups, "leave"),
        ("turn", SessionMemory, "free"),
        ("score", ExpertGroups, "leave"),
        ("score", SessionMemory, "free"),
    ],
)
def test_a_turn_that_cannot_be_ended_has_failed_and_nothing_else(
    what: str, owner: object, name: str, running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sink is not told before that it has finished, nor that it was kept."""
    once = Once(monkeypatch, owner, name, lambda *_: True)
    pruning = PruningParams(density=0.5)
    score = ScoreTask(prompt=(1, 2, 3), continuations=((4, 5, 6),), pruning=pruning)
    given = score if what == "score" else task(4, keep=what == "kept turn")
    turn_id, inbox = submit(running, given)
    last = inbox.until(Finished, Scored)
    assert once.failed
    assert isinstance(last, Failed) and isinstance(last.error, EngineFault)
    with pytest.raises(SessionNotFound, match="its last turn failed: MemoryError"):
        running.session(turn_id).result(30)
    assert isinstance(complete(running, task(4))[1], Finished)
    assert inbox.events.empty()
    eventually(lambda: at_baseline(running))


def test_tokens_that_are_drawn_and_lost_end_their_sessions_and_are_not_drawn_again(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler has moved on, so another try would go on with tokens that never were."""
    early = submit(running, task(200, top_logprobs=1))[1]
    for _ in range(3):
        early.until(TokensMade)
    once = Once(monkeypatch, Draw, "__init__", lambda *_: True)
    assert isinstance(early.until(Finished).error, EngineFault)
    assert once.failed
    assert len(complete(running, task())[0]) == 30
    eventually(lambda: at_baseline(running))


def test_a_mask_that_cannot_be_made_ends_its_session_alone(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is made because another session has left."""
    whole = PruningParams(density=1.0)
    bystander = submit(running, task(200, pruning=whole))[1]
    bystander.until(TokensMade)
    once = Once(monkeypatch, views, "ZeroedLayers", lambda *_: True)
    hit = submit(running, task(first=50, pruning=PruningParams(density=0.5, sharing="private")))[1]
    assert isinstance(hit.until(Finished).error, EngineFault)
    assert once.failed
    assert isinstance(finish(bystander)[1], Finished)
    eventually(lambda: at_baseline(running))


def test_a_prompt_that_is_cancelled_holds_no_cache_that_is_counted_as_free(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the next session begins, which may need every byte."""
    freed: list[bool] = []
    drop = PrefillQueue.drop

    def noted(queue: PrefillQueue, run: PrefillRun) -> None:
        drop(queue, run)
        freed.append(run not in queue)

    monkeypatch.setattr(PrefillQueue, "drop", noted)
    long = GenerateTask(prompt=tuple(range(200)), stopping=StoppingParams(max_tokens=1))
    busy = Busy(running)  # so that the prompt waits in the queue when it is cancelled
    turn_id, _ = submit(running, long)
    running.cancel(turn_id)
    busy.release()
    eventually(lambda: at_baseline(running))
    assert freed == [True]


def test_a_cache_that_cannot_be_made_holds_nothing(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Once(monkeypatch, KvPool, "allocate", lambda *_: True)
    assert isinstance(submit(running, task())[1].until(Finished).error, EngineFault)
    eventually(lambda: at_baseline(running))
    assert running.held_bytes == 0


def test_a_cache_that_breaks_while_it_grows_holds_nothing(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = task(5, keep=True, pruning=PruningParams(density=1.0))
    complete(running, first)
    assert len(running.sessions().result(10)) == 1  # and its cache has shrunk
    Once(monkeypatch, KvPool, "resize", lambda *_: True)
    hit = submit(running, task(continues=first.turn_id))[1].until(Finished)
    assert isinstance(hit.error, EngineFault)
    eventually(lambda: at_baseline(running))
    assert running.held_bytes == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_session_whose_logits_are_not_finite_ends_alone(
    value: float, running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [partial(task, 200, first=first) for first in (1, 20, 40)]
    expected = [complete(running, make())[0] for make in tasks]
    whole, spoilt = Decoder.head, []

    def head(self: Decoder, *arguments: object, **named: object) -> torch.Tensor:
        logits = whole(self, *arguments, **named)
        if len(logits) == 3 and not spoilt:
            logits[1, 7] = value
            spoilt.append(logits)
        return logits

    monkeypatch.setattr(Decoder, "head", head)
    inboxes = [submit(running, make())[1] for make in tasks]
    ended = 0
    for inbox, whole_run in zip(inboxes, expected, strict=True):
        tokens, end = finish(inbox)
        if isinstance(end, Failed):
            assert isinstance(end.error, NonFiniteLogits)
            assert f"position {9 + len(tokens)};" in str(end.error)  # 9 in the prompt
            assert tokens == whole_run[: len(tokens)]
            ended += 1
        else:
            assert tokens == whole_run
    assert spoilt and ended == 1
    eventually(lambda: at_baseline(running))


@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_of_logits_that_are_not_finite_is_an_error(
    value: float, at: int, running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = partial(ScoreTask, prompt=(1, 2, 3), continuations=(tuple(range(40, 48)),))
    whole, rows = Decoder.head, []

    def head(self: Decoder, *arguments: object, **named: object) -> torch.Tensor:
        logits = whole(self, *arguments, **named)
        begin = len(rows)
        rows.extend(range(len(logits)))
        if begin <= at < len(rows):
            logits[at - begin, 7] = value
        return logits

    monkeypatch.setattr(Decoder, "head", head)
    error = submit(running, scoring())[1].until(Failed).error
    assert isinstance(error, NonFiniteLogits)
    assert f"position {3 + at};" in str(error)
    monkeypatch.undo()
    eventually(lambda: at_baseline(running))
    assert submit(running, scoring())[1].until(Scored).continuations


@pytest.mark.parametrize("method", ["head", "embed", "layer"])
def test_a_step_that_fails_is_run_again_and_changes_no_token(
    method: str, running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [complete(running, task(60, first=n))[0] for n in (1, 90)]
    rows = {"head": 1, "embed": 1, "layer": 2}[method]
    once = Once(monkeypatch, Decoder, method, lambda *a: a[rows].shape[0] == 2)
    inboxes = [submit(running, task(60, first=n))[1] for n in (1, 90)]
    assert [finish(inbox)[0] for inbox in inboxes] == alone
    assert once.failed


def test_a_session_whose_client_was_told_it_is_kept_is_kept(model: Model) -> None:
    """Also when others whose next turn waits hold all that idle ones may."""
    spec = model.decoder.spec
    one = kv_bytes(spec, torch.float32, 10) + 12 * len(spec.layers) * spec.intermediate_size
    limits = Limits(idle_bytes=2 * one, max_sessions=1)
    with engine(model, prefill_source=None, limits=limits) as running:
        kept = [task(2, first=20 * n, keep=True) for n in range(2)]
        for each in kept:
            complete(running, each)
        last, inbox = task(2, first=100, keep=True), Inbox()
        inbox.open = False
        running.submit(last, inbox)
        waiting = [submit(running, task(2, continues=each.turn_id))[1] for each in kept]
        assert running.sessions().result(10)
        inbox.open = True
        running.wake()
        assert finish(inbox)[1].kept
        for other in waiting:
            assert isinstance(finish(other)[1], Finished)
        assert isinstance(complete(running, task(2, continues=last.turn_id))[1], Finished)


@pytest.mark.parametrize("timeout_s", [1e10, math.inf])
def test_an_endless_reader_time_out_is_fine(timeout_s: float, model: Model) -> None:
    limits = Limits(reader_timeout_s=timeout_s)
    with engine(model, prefill_source=None, limits=limits) as running:
        _, inbox = submit(running, task(100))
        inbox.until(TokensMade)
        inbox.open = False
        eventually(lambda: any(s.stalled for s in running.snapshot().result(10).sessions))
        inbox.open = True
        running.wake()
        assert isinstance(finish(inbox)[1], Finished)


def test_a_reader_that_reads_slowly_is_not_one_that_has_stopped(model: Model) -> None:
    """It takes one event at a time, and the engine fills the gap before it looks for stalls."""

    class Slow(Inbox):
        allowed = 3

        def put(self, event: object) -> None:
            super().put(event)
            self.allowed -= 1

        def ready(self) -> bool:
            return self.allowed > 0

    with engine(model, prefill_source=None, limits=Limits(reader_timeout_s=0.3)) as running:
        inbox = Slow()
        running.submit(task(40), inbox)
        for _ in range(12):
            time.sleep(0.06)
            inbox.allowed += 1
            running.wake()
        inbox.allowed += 1000
        running.wake()
        assert isinstance(finish(inbox)[1], Finished)


def test_densities_that_came_once_are_forgotten(running: Engine) -> None:
    for number in range(1, 20):
        pruning = PruningParams(density=number / 50, sharing="auto")
        complete(running, task(3, pruning=pruning))
    groups = running.snapshot().result(10).groups
    assert not groups.sessions and not groups.shared


def test_scores_show_how_long_turns_take(running: Engine) -> None:
    complete(running, ScoreTask(prompt=(1, 2), continuations=((3, 4),)))
    assert running.snapshot().result(10).scheduler.turn_s is not None
