"""An engine whose prompts are read elsewhere: what its prefill source is asked, what becomes of its
events, and when its prefills are cancelled."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Admitted, Finished, Scored, Started, TokensMade
from griffin_core.engine.limits import Limits
from griffin_core.engine.ports import PrefillReceiver
from griffin_core.engine.task import GenerateTask, PrefillTask, PruningParams, ScoreTask
from griffin_core.errors import (
    EngineFault,
    EngineStopped,
    HandoffBroken,
    PrefillUnavailable,
    ReaderTooSlow,
    SessionClosed,
)
from griffin_core.experts.selection import Selection
from griffin_core.forward.events import (
    LayerExperts,
    LayerKv,
    PrefillRestarted,
)
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from tests.servers import eventually
from tests.unit.core.engines import (
    Begun,
    ByHand,
    Loopback,
    at_baseline,
    complete,
    engine,
    finish,
    prefilled,
    submit,
)


@pytest.fixture
def source() -> ByHand:
    return ByHand()


@pytest.fixture
def running(model: Model, source: ByHand) -> Iterator[Engine]:
    with engine(model, prefill_source=source) as started:
        yield started


def task(max_tokens: int = 8, **more: object) -> GenerateTask:
    return GenerateTask(
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        **{"prompt": tuple(range(9)), "pruning": PruningParams(density=0.5), **more},
    )


def hand_over(running: Engine, begun: Begun) -> None:
    for event in prefilled(running, begun.task):
        begun.receiver.receive(event)


# -- what it is asked ------------------------------------------------------------------------------


def test_a_source_is_asked_for_what_was_admitted(running: Engine, source: ByHand) -> None:
    asked = task(deadline=time.monotonic() + 100)
    _, inbox = submit(running, asked)
    begun = source.next()
    assert begun.turn_id == asked.turn_id
    assert begun.task == PrefillTask(token_ids=asked.prompt, selection=Selection(density=0.5))
    assert begun.deadline == asked.deadline
    assert isinstance(inbox.get(), Admitted)
    hand_over(running, begun)
    assert len(finish(inbox)[0]) == 8


def test_a_source_is_asked_for_long_prompts_of_new_sessions_alone(
    model: Model, source: ByHand
) -> None:
    with engine(model, prefill_source=source, local_prefill_max_tokens=9) as running:
        first = task(keep=True)
        complete(running, first)
        complete(running, task(prompt=tuple(range(20)), continues=first.turn_id))
        long = task(prompt=tuple(range(10)))
        submit(running, long)
        assert source.next().turn_id == long.turn_id


def test_a_queued_session_asks_once_it_is_admitted(model: Model, source: ByHand) -> None:
    with engine(model, prefill_source=source, limits=Limits(max_sessions=1)) as running:
        first, second = task(), task()
        inboxes = [submit(running, each)[1] for each in (first, second)]
        begun = source.next()
        hand_over(running, begun)
        assert isinstance(finish(inboxes[0])[1], Finished)
        assert source.next().turn_id == second.turn_id


def test_an_engine_without_a_source_reads_everything_itself(model: Model) -> None:
    with engine(model, prefill_source=None) as running:
        assert len(complete(running, task())[0]) == 8


def test_the_old_name_of_the_limit_still_works(model: Model, source: ByHand) -> None:
    with pytest.warns(DeprecationWarning, match="local_prefill_max_tokens"):
        running = Engine(model, prefill_source=source, own_prefill_tokens=9)
    running.start()
    try:
        assert len(complete(running, task())[0]) == 8
        submit(running, task(prompt=tuple(range(10))))
        assert source.next()
    finally:
        running.stop()


# -- what becomes of its events --------------------------------------------------------------------


def test_a_score_whose_context_is_read_elsewhere_is_scored(running: Engine, source: ByHand) -> None:
    asked = ScoreTask(prompt=(1, 2, 3), continuations=((4, 5),))
    _, inbox = submit(running, asked)
    hand_over(running, source.next())
    assert isinstance(finish(inbox)[1], Scored)


def test_no_token_is_drawn_from_a_handoff_that_did_not_come_whole(
    running: Engine, source: ByHand
) -> None:
    _, inbox = submit(running, task())
    begun = source.next()
    events = prefilled(running, begun.task)
    dropped = next(event for event in events if isinstance(event, LayerExperts))
    for event in events:
        if event is not dropped:
            begun.receiver.receive(event)
    error = inbox.until(Started, TokensMade).error
    assert isinstance(error, HandoffBroken) and "2 of 3 layers" in str(error)
    assert begun.cancelled.wait(10)
    eventually(lambda: at_baseline(running))


def test_a_prefill_that_begins_again_is_taken_from_its_new_beginning(
    running: Engine, source: ByHand
) -> None:
    _, inbox = submit(running, task())
    begun = source.next()
    first, *_ = prefilled(running, begun.task)
    assert isinstance(first, LayerKv)
    begun.receiver.receive(first)
    begun.receiver.receive(PrefillRestarted())
    hand_over(running, begun)  # which brings the first layer again
    tokens, end = finish(inbox)
    assert isinstance(end, Finished) and len(tokens) == 8


def test_an_error_ends_the_turn_with_it(running: Engine, source: ByHand) -> None:
    _, inbox = submit(running, task())
    begun = source.next()
    begun.receiver.fail(PrefillUnavailable("nobody answers"))
    error = inbox.until(Finished).error
    assert isinstance(error, PrefillUnavailable) and "nobody answers" in str(error)
    assert begun.cancelled.wait(10)
    eventually(lambda: at_baseline(running))


def test_a_source_that_cannot_begin_ends_the_turn(model: Model) -> None:
    class Broken:
        def start(
            self, turn_id: str, task: PrefillTask, deadline: float | None, receiver: PrefillReceiver
        ) -> Begun:
            if len(task.token_ids) > 9:
                raise PrefillUnavailable("too long")
            raise ZeroDivisionError

    with engine(model, prefill_source=Broken()) as running:
        fault = submit(running, task())[1].until(Finished).error
        assert isinstance(fault, EngineFault) and "ZeroDivisionError" in str(fault)
        refused = submit(running, task(prompt=tuple(range(10))))[1].until(Finished).error
        assert isinstance(refused, PrefillUnavailable)
        eventually(lambda: at_baseline(running))


def test_what_comes_after_the_end_is_ignored(running: Engine, source: ByHand) -> None:
    turn_id, inbox = submit(running, task(3, keep=True))
    begun = source.next()
    events = prefilled(running, begun.task)
    for event in events:
        begun.receiver.receive(event)
    begun.receiver.receive(events[-1])  # its prefill is over
    begun.receiver.fail(HandoffBroken("too late"))
    tokens, end = finish(inbox)
    assert isinstance(end, Finished) and len(tokens) == 3
    for event in (*events, PrefillRestarted()):  # and now its turn is
        begun.receiver.receive(event)
    begun.receiver.fail(HandoffBroken("far too late"))
    assert running.session(turn_id).result(10).generated_tokens == 3
    assert inbox.events.empty()


def test_events_of_one_turn_do_not_reach_the_next_one_of_its_session(
    model: Model, source: ByHand
) -> None:
    with engine(model, prefill_source=source) as running:
        first = task(2, keep=True)
        inbox = submit(running, first)[1]
        begun = source.next()
        hand_over(running, begun)
        finish(inbox)
        _, inbox = submit(running, task(200, prompt=(1,), continues=first.turn_id))
        inbox.until(TokensMade)
        begun.receiver.fail(HandoffBroken("of the turn before"))
        assert len(finish(inbox)[0]) == 199


# -- when its prefills are cancelled ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "close", "stop"])
def test_a_prefill_is_cancelled_when_its_turn_is_ended(
    how: str, model: Model, source: ByHand
) -> None:
    with engine(model, prefill_source=source) as running:
        turn_id, inbox = submit(running, task())
        begun = source.next()
        assert not begun.cancelled.is_set()
        match how:
            case "cancel":
                running.cancel(turn_id)
            case "close":
                running.close(turn_id).result(10)
                assert isinstance(inbox.until(Finished).error, SessionClosed)
            case "stop":
                running.stop()
                assert isinstance(inbox.until(Finished).error, EngineStopped)
        assert begun.cancelled.wait(10)


@pytest.mark.parametrize("keep", [False, True])
def test_a_prefill_is_cancelled_when_its_turn_has_finished(
    keep: bool, running: Engine, source: ByHand
) -> None:
    """Once: it may still hold something, and ``Begun.cancel`` checks that it is told once."""
    turn_id, inbox = submit(running, task(keep=keep))
    begun = source.next()
    hand_over(running, begun)
    assert isinstance(finish(inbox)[1], Finished)
    assert begun.cancelled.wait(10)
    if keep:
        running.close(turn_id).result(10)
    eventually(lambda: at_baseline(running))


def test_a_prefill_is_cancelled_when_its_reader_is_too_slow(model: Model, source: ByHand) -> None:
    with engine(
        model, prefill_source=source, limits=Limits(reader_timeout_s=0.1), stream_interval=1
    ) as running:
        _, inbox = submit(running, task(200))
        inbox.open = False
        begun = source.next()
        hand_over(running, begun)
        assert isinstance(inbox.until(Finished).error, ReaderTooSlow)
        assert begun.cancelled.wait(10)


def test_a_prefill_that_cannot_be_cancelled_holds_no_memory(
    running: Engine, source: ByHand, caplog: pytest.LogCaptureFixture
) -> None:
    turn_id, _ = submit(running, task())
    begun = source.next()
    begun.cancel()  # and a second time is an error
    running.cancel(turn_id)
    eventually(lambda: at_baseline(running))
    assert running.held_bytes == 0
    assert "cannot be cancelled" in caplog.text


def test_a_cancelled_prefill_of_another_engine_ends_there(model: Model) -> None:
    with engine(model, prefill_source=None, limits=Limits(chunk_tokens=1)) as reader:
        source = Loopback(reader)
        with engine(model, prefill_source=source) as running:
            source.reader = reader
            turn_id, inbox = submit(running, task(prompt=tuple(range(200))))
            inbox.until(Admitted)
            eventually(lambda: turn_id in source.begun)
            running.cancel(turn_id)
            eventually(lambda: source.begun[turn_id].cancelled)
            reader.wake()
            eventually(lambda: not reader.snapshot().result(10).prefills.queued)


def test_nothing_is_sent_to_a_reader_before_its_turn_is_admitted(
    running: Engine, source: ByHand
) -> None:
    _, inbox = submit(running, task(1))
    begun = source.next()
    hand_over(running, begun)
    kinds = [type(inbox.get()) for _ in range(4)]
    assert kinds == [Admitted, Started, TokensMade, Finished]
    assert inbox.events.empty()
