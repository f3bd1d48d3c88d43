"""The engine: sessions take turns, end alone, and leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Admitted, Finished, Started, TokensMade
from griffin_core.engine.limits import Limits
from griffin_core.engine.loop import EngineLoop
from griffin_core.engine.sampler_slots import SamplerSlots
from griffin_core.engine.session import State
from griffin_core.engine.task import (
    MAX_CONCURRENT_PREFILLS,
    GenerateTask,
    PrefillTask,
    PruningParams,
    ScoreTask,
)
from griffin_core.errors import (
    CapacityExhausted,
    EngineFault,
    EngineStopped,
    InvalidRequest,
    SessionBusy,
    SessionClosed,
    SessionNotFound,
)
from griffin_core.experts.selection import Selection
from griffin_core.forward.events import (
    PrefillFinished,
)
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.load import Model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.stopping import FinishReason, StoppingParams
from griffin_core.slim.masked import Masked
from griffin_core.slim.packed import Packed
from tests.servers import eventually
from tests.unit.core.engines import Busy, ByHand, Inbox, complete, engine, finish, prefilled, submit

PROMPT = tuple(range(20, 40))


def task(
    max_tokens: int = 8, prompt: tuple[int, ...] = PROMPT, density: float = 1.0, **more: object
) -> GenerateTask:
    return GenerateTask(
        prompt=prompt,
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        pruning=PruningParams(density=density),
        **more,
    )


@pytest.fixture
def running(model: Model) -> Iterator[Engine]:
    with engine(model) as started:
        yield started


def sessions(running: Engine) -> list[State]:
    return [info.state for info in running.sessions().result(10)]


def held_bytes(running: Engine) -> int:
    return sum(info.reserved_bytes for info in running.sessions().result(10))


def test_a_session_generates_and_is_gone(running: Engine) -> None:
    tokens, finished = complete(running, task())
    assert len(tokens) == 8
    assert finished.reason is FinishReason.MAX_TOKENS
    assert (finished.prompt_tokens, finished.generated_tokens) == (20, 8)
    assert sessions(running) == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_packed_and_masked_generate_the_same(name: str, tiny: Callable[[str], Model]) -> None:
    made = []
    for slim in (Packed(), Masked()):
        with engine(tiny(name), slim=slim) as running:
            made.append(complete(running, task(24, density=0.5))[0])
    assert made[0] == made[1]


def test_sessions_that_take_turns_make_what_each_makes_alone(running: Engine) -> None:
    tasks = [
        task(5 + n, prompt=tuple(range(n, 9 + 2 * n)), density=(1.0, 0.5, 0.1)[n % 3])
        for n in range(8)
    ]
    alone = [complete(running, each)[0] for each in tasks]
    inboxes = [submit(running, each)[1] for each in tasks]
    assert [finish(inbox)[0] for inbox in inboxes] == alone


def test_density_policy_and_seed_default_to_the_engines(model: Model) -> None:
    with engine(model, selection=Selection(density=0.25, policy="magnitude")) as running:
        inherited = GenerateTask(prompt=PROMPT, stopping=StoppingParams(max_tokens=1))
        _, finished = complete(running, inherited)
        assert (finished.pruning.density, finished.pruning.policy) == (0.25, "magnitude")
        assert finished.pruning.experts_per_layer == 22


def test_figures_say_what_the_pruning_did(running: Engine, model: Model) -> None:
    _, finished = complete(running, task(density=0.5))
    figures = finished.pruning
    assert (figures.experts_per_layer, figures.ff_width) == (44, 88)
    assert len(figures.norm_mass) == 3
    assert all(0.5 < mass < 1 for mass in figures.norm_mass)
    assert figures.slim_view_bytes >= 3 * 3 * 44 * 48 * 4
    assert figures.kv_cache_bytes == kv_bytes(model.decoder.spec, torch.float32, 28)


def test_figures_say_what_the_tokens_ran_on(running: Engine) -> None:
    for density in (1.0, 0.5):
        tokens, finished = complete(running, task(9, density=density))
        ran = finished.pruning
        assert ran.dense_tokens == (len(tokens) if density == 1.0 else 1)  # the prompt's
        assert ran.mean_density == pytest.approx((1 + (len(tokens) - 1) * density) / len(tokens))
    score = ScoreTask(
        prompt=PROMPT, continuations=((1, 2, 3, 4),), pruning=PruningParams(density=0.25)
    )
    ran = complete(running, score)[1].pruning
    assert (ran.mean_density, ran.dense_tokens) == (pytest.approx(1.75 / 4), 1)


def test_sampled_tokens_repeat_with_their_seed(running: Engine) -> None:
    def draw(seed: int) -> list[int]:
        sampling = SamplingParams(temperature=1.0, seed=seed)
        return complete(running, task(16, sampling=sampling))[0]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_the_context_length_ends_a_completion(running: Engine) -> None:
    tokens, finished = complete(running, task(1000, prompt=tuple(range(250))))
    assert finished.reason is FinishReason.CONTEXT_LENGTH
    assert len(tokens) == 6


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_tokens_come_in_messages_of_so_many_behind_the_first(model: Model, interval: int) -> None:
    with engine(model) as running:
        expected, _ = complete(running, task(12))
    with engine(model, stream_interval=interval) as running:
        _, inbox = submit(running, task(12, top_logprobs=1))
        messages = []
        while isinstance(event := inbox.until(TokensMade, Finished), TokensMade):
            messages.append(event)
    assert [token for message in messages for token in message.ids] == expected
    assert all(len(message.logprobs) == len(message.ids) for message in messages)
    sizes = [len(message.ids) for message in messages]
    assert sizes[0] == 1 and sum(sizes) == 12
    assert all(size == interval for size in sizes[1:-1]) and 1 <= sizes[-1] <= interval


def test_a_turn_that_fails_first_shows_the_tokens_it_has_made(model: Model) -> None:
    with engine(model, stream_interval=1000) as running:
        turn_id, inbox = submit(running, task(200))
        inbox.until(TokensMade)
        eventually(lambda: running.session(turn_id).result(10).generated_tokens > 5)
        running.close(turn_id).result(10)
        assert len(inbox.until(TokensMade).ids) >= 5
        assert isinstance(inbox.until(Finished).error, SessionClosed)


def test_logprobs_come_with_each_token(running: Engine) -> None:
    _, inbox = submit(running, task(3, top_logprobs=2))
    made = [inbox.until(TokensMade) for _ in range(3)]
    for event in made:
        (logprobs,) = event.logprobs
        assert logprobs.top[0] == (event.ids[0], pytest.approx(logprobs.chosen))  # greedy
        assert logprobs.top[0][1] >= logprobs.top[1][1]


def test_scoring_equals_generating(running: Engine) -> None:
    """Greedy tokens score as greedy, in one run, and with the log-probabilities they had."""
    asked = task(300 - 280, density=0.5, top_logprobs=0)
    _, inbox = submit(running, asked)
    events = []
    while isinstance(event := inbox.until(TokensMade, Finished), TokensMade):
        events.append(event)
    tokens = tuple(event.ids[0] for event in events)
    score = ScoreTask(prompt=PROMPT, continuations=(tokens,), pruning=PruningParams(density=0.5))
    _, scored = complete(running, score)
    assert scored.continuations[0].greedy == (True,) * 20
    expected = [event.logprobs[0].chosen for event in events]
    assert scored.continuations[0].logprobs == pytest.approx(expected, abs=1e-4)


# -- later turns -----------------------------------------------------------------------------------


def test_turns_of_a_kept_session_equal_one_shot_calls_with_the_whole_text(running: Engine) -> None:
    first = task(6, keep=True)
    tokens, _ = complete(running, first)
    assert sessions(running) == [State.IDLE]
    transcript = [*PROMPT, *tokens]
    for turn in ((7, 8, 9), (30,), (1, 2)) * 3:
        asked = task(6, prompt=turn, continues=first.turn_id, keep=True)
        tokens, finished = complete(running, asked)
        transcript += turn
        assert tokens == complete(running, task(6, prompt=tuple(transcript)))[0]
        transcript += tokens
        assert finished.context_tokens == len(transcript)
        assert finished.prompt_tokens == len(turn) + 1  # and the last token of the turn before


def test_a_later_turn_selects_from_the_statistic_of_all_turns(running: Engine) -> None:
    first = task(1, prompt=PROMPT, density=0.5, keep=True)
    tokens, _ = complete(running, first)
    second = task(12, prompt=(5, 6, 7), density=0.5, continues=first.turn_id)
    whole = task(12, prompt=(*PROMPT, *tokens, 5, 6, 7), density=0.5)
    later, later_finished = complete(running, second)
    at_once, at_once_finished = complete(running, whole)
    assert later == at_once
    assert later_finished.pruning.norm_mass == pytest.approx(at_once_finished.pruning.norm_mass)


def test_a_later_turn_keeps_density_and_policy_unless_told(running: Engine) -> None:
    first = task(1, density=0.5, keep=True)
    complete(running, first)
    silent = GenerateTask(
        prompt=(1,),
        stopping=StoppingParams(max_tokens=1),
        continues=first.turn_id,
        keep=True,
    )
    assert complete(running, silent)[1].pruning.density == 0.5
    told = task(1, prompt=(1,), density=0.25, continues=first.turn_id, keep=True)
    assert complete(running, told)[1].pruning.density == 0.25


def test_unknown_busy_and_overlong_sessions_are_refused(running: Engine) -> None:
    assert isinstance(
        submit(running, task(continues="nobody"))[1].until(Finished).error, SessionNotFound
    )
    first = task(200, keep=True)
    _, inbox = submit(running, first)
    inbox.until(Started)
    busy = submit(running, task(continues=first.turn_id))[1].until(Finished)
    assert isinstance(busy.error, SessionBusy)
    finish(inbox)
    long = submit(running, task(continues=first.turn_id, prompt=(1,) * 100))[1].until(Finished)
    assert isinstance(long.error, InvalidRequest)
    assert sessions(running) == [State.IDLE]  # and is still there


def test_ending_a_turn_that_was_refused_leaves_the_running_one_alone(running: Engine) -> None:
    first = task(100, keep=True)
    _, inbox = submit(running, first)
    inbox.until(Started)
    refused, other = submit(running, task(continues=first.turn_id))
    assert isinstance(other.until(Finished).error, SessionBusy)
    running.cancel(refused)
    tokens, _ = finish(inbox)
    assert len(tokens) == 100
    running.cancel(first.turn_id)  # over already: the session was kept
    assert sessions(running) == [State.IDLE]


def test_kept_sessions_expire(model: Model) -> None:
    with engine(model, limits=Limits(session_ttl_s=0.05)) as running:
        complete(running, task(1, keep=True))
        eventually(lambda: sessions(running) == [])


def test_idle_sessions_give_way_the_longest_idle_first(model: Model) -> None:
    one = kv_bytes(model.decoder.spec, torch.float32, 21)
    limits = Limits(session_bytes=3 * one, idle_bytes=3 * one)
    with engine(model, limits=limits) as running:
        kept = [task(1, keep=True) for _ in range(3)]
        for each in kept:
            complete(running, each)
        left = [info.session_id for info in running.sessions().result(10)]
        assert left == [each.turn_id for each in kept[1:]]


def test_a_waiting_turn_of_a_kept_session_does_not_block_who_waits_before_it(
    model: Model,
) -> None:
    tokens = kv_bytes(model.decoder.spec, torch.float32, 1)
    # The statistics of a kept session are as large as the KV of 4.1 tokens.
    limits = Limits(session_bytes=105 * tokens, idle_bytes=105 * tokens)
    with engine(model, limits=limits) as running:
        kept = task(29, keep=True)  # 49 of 105 tokens
        complete(running, kept)
        live, large = task(31), task(40)  # 51, and 60: more than there is beside either
        later = task(1, prompt=(1,), continues=kept.turn_id)
        inboxes = [submit(running, each)[1] for each in (live, large, later)]
        for inbox in inboxes:
            assert isinstance(finish(inbox)[1], Finished)


def test_kept_sessions_that_block_one_another_give_way(model: Model) -> None:
    tokens = kv_bytes(model.decoder.spec, torch.float32, 1)
    limits = Limits(max_sessions=1, session_bytes=104 * tokens, idle_bytes=104 * tokens)
    with engine(model, limits=limits) as running:
        kept = [task(20, keep=True) for _ in range(2)]  # 44 of 104 tokens each
        for each in kept:
            complete(running, each)
        submit(running, task(12, prompt=(1, 2)))
        # 75 each, and a third of it to grow by.
        turns = [task(34, prompt=(1,), continues=each.turn_id) for each in kept]
        inboxes = [submit(running, each)[1] for each in turns]
        evicted = inboxes[1].until(Finished)
        assert isinstance(evicted.error, CapacityExhausted)
        assert isinstance(finish(inboxes[0])[1], Finished)


def test_a_smaller_later_turn_reserves_what_the_cache_still_holds(running: Engine) -> None:
    first = task(100, keep=True)
    complete(running, first)
    complete(running, task(1, prompt=(1,), continues=first.turn_id, keep=True))
    (info,) = running.sessions().result(10)
    assert info.reserved_bytes >= info.pruning.kv_cache_bytes


def test_the_engine_sleeps_while_a_later_turn_waits(model: Model) -> None:
    source = ByHand()
    limits = Limits(max_sessions=1)
    with engine(model, limits=limits, prefill_source=source, local_prefill_max_tokens=1) as running:
        # The kept session's own next turn waits behind one whose prompt never comes.
        kept = task(1, prompt=(1,), keep=True)
        complete(running, kept)
        submit(running, task())
        submit(running, task(1, prompt=(1,), continues=kept.turn_id))
        eventually(lambda: sessions(running) == [State.QUEUED, State.PREFILL])
        assert running.snapshot().result(10).next_due_s is None


def test_an_endless_time_to_live_is_fine(model: Model) -> None:
    with engine(model, limits=Limits(session_ttl_s=float("inf"))) as running:
        complete(running, task(1, keep=True))
        assert sessions(running) == [State.IDLE]


# -- admission -------------------------------------------------------------------------------------


def test_sessions_beyond_the_limit_wait_in_order(model: Model) -> None:
    source = ByHand()
    with engine(model, limits=Limits(max_sessions=1), prefill_source=source) as running:
        tasks = task(), task(), task()
        inboxes = [submit(running, each)[1] for each in tasks]
        assert sessions(running) == [State.PREFILL, State.QUEUED, State.QUEUED]
        for each, inbox in zip(tasks, inboxes, strict=True):
            begun = source.next()
            assert begun.turn_id == each.turn_id
            for event in prefilled(running, begun.task):
                begun.receiver.receive(event)
            assert isinstance(finish(inbox)[1], Finished)


def test_a_full_queue_refuses_with_a_hint(model: Model) -> None:
    limits = Limits(max_sessions=1, max_queue=1)
    with engine(model, limits=limits, prefill_source=ByHand()) as running:
        submit(running, task())
        submit(running, task())
        refused = submit(running, task())[1].until(Finished)
        assert isinstance(refused.error, CapacityExhausted)
        assert refused.error.retry_after_s > 0


def test_bytes_hold_sessions_back_and_what_never_fits_is_refused_at_once(model: Model) -> None:
    one = kv_bytes(model.decoder.spec, torch.float32, 28)
    with engine(model, limits=Limits(session_bytes=one), prefill_source=ByHand()) as running:
        submit(running, task())
        submit(running, task())
        assert sessions(running) == [State.PREFILL, State.QUEUED]
        never = submit(running, task(9))[1].until(Finished)
        assert isinstance(never.error, CapacityExhausted)
        assert never.error.retry_after_s is None
        assert held_bytes(running) == one


# -- ending early ----------------------------------------------------------------------------------


def test_cancelling_frees_a_session_in_the_queue_in_prefill_and_in_decode(model: Model) -> None:
    limits = Limits(max_sessions=2)
    with engine(
        model, limits=limits, prefill_source=ByHand(), local_prefill_max_tokens=1
    ) as running:
        decoding_id, decoding_inbox = submit(running, task(230, prompt=(1,)))
        decoding_inbox.until(Started)
        prefilling_id, _ = submit(running, task())
        queued_id, _ = submit(running, task())
        assert sessions(running) == [State.DECODE, State.PREFILL, State.QUEUED]
        running.cancel(queued_id)
        assert sessions(running) == [State.DECODE, State.PREFILL]
        running.cancel(prefilling_id)
        assert sessions(running) == [State.DECODE]
        running.cancel(decoding_id)
        assert sessions(running) == []
        assert held_bytes(running) == 0


def test_cancelling_a_prefill_stops_it_within_a_chunk(running: Engine) -> None:
    inbox = Inbox()
    inbox.open = False  # pauses it behind its first event
    run = running.prefill(PrefillTask(token_ids=PROMPT, selection=Selection(density=1.0)), inbox)
    inbox.open = True
    running.wake()
    inbox.get()
    run.cancel()
    running.wake()
    eventually(lambda: not running.snapshot().result(10).prefills.queued)


def test_closing_a_running_session_tells_its_caller(model: Model) -> None:
    with engine(model, prefill_source=ByHand()) as running:
        session_id, inbox = submit(running, task())
        running.close(session_id).result(10)
        assert isinstance(inbox.until(Finished).error, SessionClosed)
        with pytest.raises(SessionNotFound):
            running.close(session_id).result(10)


def test_a_fault_in_one_session_leaves_the_others_running(
    running: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from griffin_core.engine.generation import Generation  # noqa: PLC0415

    healthy, sick = task(40), task(40)
    take = Generation.take
    monkeypatch.setattr(
        Generation,
        "take",
        lambda self, session, drawn: (
            take(self, session, drawn) if session.session_id == healthy.turn_id else 1 // 0
        ),
    )
    inboxes = [submit(running, each)[1] for each in (healthy, sick)]
    assert isinstance(finish(inboxes[1])[1].error, EngineFault)
    assert len(finish(inboxes[0])[0]) == 40
    assert sessions(running) == []
    assert "ZeroDivisionError" in caplog.text


def test_a_reader_that_lags_pauses_only_its_own_session(running: Engine) -> None:
    lagging, eager = task(20), task(20)
    (_, slow), (_, fast) = submit(running, lagging), submit(running, eager)
    slow.open = False
    slow.until(Started)
    assert len(finish(fast)[0]) == 20
    assert sessions(running) == [State.DECODE]
    slow.open = True
    running.wake()
    assert isinstance(finish(slow)[1], Finished)


def test_stopping_ends_everything_with_an_error(model: Model) -> None:
    with engine(model, limits=Limits(max_sessions=1), prefill_source=ByHand()) as running:
        inboxes = [submit(running, task())[1] for _ in range(2)]
        inboxes[0].until(Admitted)
    assert all(isinstance(inbox.until(Finished).error, EngineStopped) for inbox in inboxes)
    late = submit(running, task())[1].until(Finished)
    assert isinstance(late.error, EngineStopped)
    with pytest.raises(EngineStopped):
        running.sessions().result(10)


def test_a_bug_in_the_loop_leaves_nobody_waiting(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Engine(model)
    monkeypatch.setattr(EngineLoop, "tick", None)
    running.start()
    inbox = submit(running, task())[1]
    assert isinstance(inbox.until(Finished).error, EngineStopped)
    with pytest.raises(TypeError):
        running.ended.result(10)


def test_a_lost_device_that_cannot_even_free_its_memory_leaves_nobody_waiting(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("the device is lost")

    running = Engine(model, prefill_source=ByHand())
    running.start()
    inboxes = [submit(running, task())[1] for _ in range(3)]
    for inbox in inboxes:
        inbox.until(Admitted)
    monkeypatch.setattr(SamplerSlots, "release", lost)
    monkeypatch.setattr(EngineLoop, "tick", lost)
    submit(running, task())
    for inbox in inboxes:
        assert isinstance(inbox.until(Finished).error, EngineStopped)
    with pytest.raises(RuntimeError, match="the device is lost"):
        running.ended.result(10)


def test_an_engine_that_does_not_come_up_says_so(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("griffin_core.engine.step_setup.measure_costs", lambda *_: 1 // 0)
    running = Engine(model, costs=None)
    running.start()
    for future in (running.ready, running.ended):
        with pytest.raises(ZeroDivisionError):
            future.result(10)


def test_an_engine_is_ready_once_it_has_started(running: Engine) -> None:
    assert running.ready.result(10) is None


def test_a_bug_in_a_command_is_that_callers_alone(running: Engine) -> None:
    class Broken(Inbox):
        def put(self, event: object) -> None:
            raise ZeroDivisionError

    running.submit(task(continues="nobody"), Broken())
    assert len(complete(running, task())[0]) == 8


def test_a_question_whose_asker_has_gone_harms_nobody(running: Engine) -> None:
    busy = Busy(running)
    asked = [running.sessions(), running.close("nobody"), running.sessions()]
    assert all(question.cancel() for question in asked)
    busy.release()
    assert len(complete(running, task())[0]) == 8


def test_the_wait_for_a_busy_engine_counts_as_queueing(running: Engine) -> None:
    busy = Busy(running)
    _, inbox = submit(running, task(1))
    timer = threading.Timer(0.2, busy.release)
    timer.start()
    timings = finish(inbox)[1].timings
    assert timings.queue_s >= 0.2
    assert timings.first_token_s >= timings.queue_s + timings.prefill_s


def test_a_handoff_that_arrives_while_the_engine_stops_is_no_fault(model: Model) -> None:
    source = ByHand()
    with engine(model, prefill_source=source) as running:
        _, inbox = submit(running, task())
        begun = source.next()
        events = prefilled(running, begun.task)
        busy = Busy(running)
        for event in events[:-1]:
            begun.receiver.receive(event)
        threading.Timer(0.1, busy.release).start()  # by then it has been told to stop
    assert isinstance(inbox.until(Finished).error, EngineStopped)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"max_sessions": 0}, "max_sessions"),
        ({"session_bytes": -1}, "session_bytes"),
        ({"memory_fraction": 1.5}, "memory_fraction"),
        ({"session_ttl_s": float("nan")}, "session_ttl_s"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
    ],
)
def test_limits_are_checked(values: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**values)


# -- prefills ------------------------------------------------------------------------------------


def test_admitted_sessions_are_not_refused_by_the_prefill_queue(model: Model) -> None:
    """The queue's limit was applied when they were admitted."""
    with engine(model, limits=Limits(max_queue=0), prefill_source=None) as running:
        busy = Busy(running)
        inboxes = [submit(running, task())[1] for _ in range(6)]
        refused = Inbox()
        running.prefill(PrefillTask(token_ids=PROMPT, selection=Selection(density=0.5)), refused)
        busy.release()
        assert isinstance(refused.until(PrefillFinished).error, CapacityExhausted)
        assert all(len(finish(inbox)[0]) == 8 for inbox in inboxes)


def test_readers_that_lag_hold_few_caches(model: Model) -> None:
    with engine(model, limits=Limits(chunk_tokens=4)) as running:  # five passes each
        asked = PrefillTask(token_ids=PROMPT, selection=Selection(density=0.5))
        inboxes = [Inbox() for _ in range(2 * MAX_CONCURRENT_PREFILLS)]

        def close_after_first(inbox: Inbox) -> Callable[[object], None]:
            def put(event: object) -> None:
                inbox.open = False
                Inbox.put(inbox, event)

            return put

        for inbox in inboxes:
            inbox.put = close_after_first(inbox)  # type: ignore[method-assign]
            running.prefill(asked, inbox)
        eventually(
            lambda: running.snapshot().result(10).prefills.owning_cache == MAX_CONCURRENT_PREFILLS
        )
        assert running.snapshot().result(10).prefills.queued == len(inboxes)
        for inbox in inboxes:
            inbox.put = partial(Inbox.put, inbox)  # type: ignore[method-assign]
            inbox.open = True
        running.wake()
        assert all(isinstance(i.until(PrefillFinished), PrefillFinished) for i in inboxes)
