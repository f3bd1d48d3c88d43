"""Admission: what may begin, what is refused, and that bytes are never exceeded."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch

from griffin_core.decode.events import Failed, Finished, Started
from griffin_core.decode.scheduler import Limits
from griffin_core.decode.task import GenerateTask, PruningParams
from griffin_core.engine import Engine
from griffin_core.errors import CapacityExhausted, SessionNotFound
from griffin_core.kv_cache import kv_bytes
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from tests.core.engines import Inbox, complete, engine, finish, submit


@pytest.fixture
def model(tiny: Callable[[str], Model]) -> Model:
    return tiny("llama")


def task(
    max_tokens: int = 8, prompt: int = 20, density: float = 1.0, **more: object
) -> GenerateTask:
    return GenerateTask(
        prompt=tuple(range(prompt)),
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        pruning=PruningParams(density=density),
        **more,
    )


def test_a_request_that_cannot_begin_before_its_deadline_is_refused_at_once(
    model: Model,
) -> None:
    with engine(model, own_prefill_tokens=None, limits=Limits(max_sessions=1)) as running:
        complete(running, task(200))  # shows how long a turn takes
        assert running.sessions().result(10) == []  # and it is noted
        turn_s = running._decoding.scheduler._turn_s
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
    with engine(model, own_prefill_tokens=None) as running:
        complete(running, task(200))
        asked = task(deadline=time.monotonic() + 0.001)
        assert isinstance(finish(submit(running, asked)[1])[1], Finished)


def test_kept_sessions_beyond_the_idle_budget_go_the_longest_idle_first(model: Model) -> None:
    one = kv_bytes(model.decoder.spec, torch.float32, 28)
    limits = Limits(idle_bytes=2 * one)
    with engine(model, own_prefill_tokens=None, limits=limits) as running:
        kept = [task(keep=True) for _ in range(3)]
        for each in kept:
            assert complete(running, each)[1].kept
        left = [info.session_id for info in running.sessions().result(10)]
        assert left == [each.turn_id for each in kept[1:]]
        again = submit(running, task(continues=kept[0].turn_id))[1].until(Finished)
        assert isinstance(again.error, SessionNotFound)
        assert "gave way to sessions kept later" in str(again.error)


def test_a_session_that_is_larger_than_the_idle_budget_is_not_kept(model: Model) -> None:
    limits = Limits(idle_bytes=kv_bytes(model.decoder.spec, torch.float32, 27))
    with engine(model, own_prefill_tokens=None, limits=limits) as running:
        _, finished = complete(running, task(keep=True))
        assert not finished.kept
        assert running.sessions().result(10) == []


def test_a_kept_session_holds_no_more_than_its_tokens(model: Model) -> None:
    with engine(model, own_prefill_tokens=None) as running:
        (first,), _ = complete(running, task(1, density=0.5))
        stopped = GenerateTask(
            prompt=tuple(range(20)),
            stopping=StoppingParams(max_tokens=200, stop_token_ids=frozenset([first])),
            pruning=PruningParams(density=0.5),
            keep=True,
        )
        complete(running, stopped)
        (info,) = running.sessions().result(10)
        assert info.context_tokens == 21
        assert info.reserved_bytes == kv_bytes(model.decoder.spec, torch.float32, 20)


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
    with engine(model, own_prefill_tokens=None) as running:
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
    with engine(model, own_prefill_tokens=None, limits=limits, sharing=sharing) as running:
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
    decoding = running._decoding
    caches = sum(s.cache.nbytes for s in decoding.scheduler if s.cache is not None)
    views = decoding._views.nbytes
    assert running.held_bytes == caches + views
    for info in infos:
        running.close(info.session_id).result(10)
    assert running.held_bytes == views
    assert not any(view.users for view in decoding._views.held)
