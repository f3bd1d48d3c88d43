"""Random conversations, with everything a request can ask for, crowded into a small engine: each
makes what it makes alone, and after every turn of the engine its books are right."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Admitted, Failed, Finished, TokensMade
from griffin_core.engine.limits import Limits
from griffin_core.engine.loop import EngineLoop
from griffin_core.engine.session import State
from griffin_core.engine.snapshot import EngineSnapshot
from griffin_core.engine.take_snapshot import take_snapshot
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.errors import SessionClosed, SessionNotFound
from griffin_core.experts.policies import POLICIES
from griffin_core.experts.selection import Selection
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.load import Model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler
from griffin_core.sampling.stopping import StoppingParams
from tests.unit.core.engines import Loopback, engine, submit
from tests.unit.core.pieces import Pieces
from tests.unit.core.test_scheduler import kept_bytes

CONVERSATIONS = [24, pytest.param(300, marks=pytest.mark.slow)]

PIECES = Pieces([b"\nA:", b" red", b"abc", "é".encode() + b"A"])
FEW = PIECES.ids("\nA:", " red", "abc", "é".encode() + b"A", *"abcrd\nA: ", "é".encode()[:1], "X")
END = FEW[-1]
STOPS = ("ab", "bca", "\nA:", "red", "A", "é", "a", "cc", "b ", "\ufffd")


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Model]) -> Model:
    return replace(tiny("llama"), tokenizer=PIECES.tokenizer, eos_ids=frozenset({END}))


def random_turn(draw: random.Random) -> dict[str, Any]:
    most = draw.choice((1, 2, 5, 12, 30))
    words = {tuple(draw.choices(FEW, k=draw.choice((1, 2, 3)))) for _ in range(3)}
    return {
        "prompt": tuple(draw.choices(FEW, k=draw.choice((1, 7, 20)))),
        "sampling": SamplingParams(
            temperature=draw.choice((0.0, 0.8, 2.0)),
            top_k=draw.choice((0, 5)),
            repetition_penalty=draw.choice((1.0, 1.3)),
            frequency_penalty=draw.choice((0.0, 0.5)),
            seed=draw.randrange(1 << 40),
            bad_words_ids=tuple(sorted(words)) if draw.random() < 0.4 else (),
            allowed_token_ids=frozenset(draw.choice(((), FEW, draw.sample(FEW, 7)))),
        ),
        "stopping": StoppingParams(
            max_tokens=most,
            stop=tuple(draw.sample(STOPS, draw.choice((0, 1, 3)))),
            stop_token_ids=frozenset(draw.sample(FEW, draw.choice((0, 0, 2)))),
            ignore_eos=draw.random() < 0.4,
            min_tokens=draw.choice((0, 0, min(most, 3))),
            include_stop_string=draw.random() < 0.3,
        ),
        "pruning": PruningParams(
            density=draw.choice((None, 1.0, 0.5, 0.25)),
            policy=draw.choice((None, *POLICIES)),
            correction=draw.choice((None, "none", "bias", "residual")),
        ),
        "top_logprobs": 0,
    }


@dataclass
class Made:
    """What came of a turn."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    end: Any = None
    holds: list[int] | None = None
    """The kept session's tokens, if it is still there."""

    def take(self, event: Any) -> None:
        if isinstance(event, TokensMade):
            self.ids += event.ids
            self.text += event.text
            self.logprobs += [each.chosen for each in event.logprobs]
        elif isinstance(event, Finished | Failed):
            self.end = event

    def equals(self, other: Made, *, to_the_bit: bool) -> bool:
        tolerance = 0.0 if to_the_bit else 1e-3
        return (
            self.told() == other.told()
            and self.logprobs == pytest.approx(other.logprobs, abs=tolerance)
            and (None in (self.holds, other.holds) or self.holds == other.holds)
        )

    def told(self) -> tuple[object, ...]:
        end = self.end
        if isinstance(end, Failed):
            return self.ids, self.text, str(end.error)
        counts = end.prompt_tokens, end.generated_tokens, end.context_tokens
        return self.ids, self.text, end.reason, end.stop, *counts


def tokens_of(running: Engine, session_id: str) -> list[int] | None:
    session = running.snapshot(contents=True).result(30).session(session_id)
    return None if session is None else list(session.tokens or ())


def conversation(model: Model, draw: random.Random, **options: Any) -> list[tuple[Any, Made]]:
    """Some turns of one session, and what each makes alone on an engine of its own."""
    turns: list[tuple[Any, Made]] = []
    session_id = None
    with engine(model, prefill_source=None, **options) as running:
        for _ in range(draw.randint(1, 4)):
            asked, made = random_turn(draw), Made()
            task = GenerateTask(**asked, keep=True, continues=session_id)
            _, inbox = submit(running, task)
            while made.end is None:
                made.take(inbox.get())
            turns.append((asked, made))
            if isinstance(made.end, Failed):
                break
            session_id = session_id or task.turn_id
            made.holds = tokens_of(running, session_id)
    return turns


def check_books(held: EngineSnapshot, limits: Limits, model: Model) -> None:
    """What is counted is what is there, and every session is in one place."""
    scheduler, everyone = held.scheduler, held.sessions
    caches = sum(s.cache.nbytes for s in everyone if s.cache is not None)
    assert held.nbytes.held == caches + held.nbytes.views
    assert 0 <= held.nbytes.held <= held.nbytes.limit
    slots = [s.slot for s in everyone if s.slot is not None]
    assert sorted([*slots, *held.free_slots]) == list(range(limits.max_sessions))
    assert held.slots_in_use <= set(slots)
    for kept, nbytes in (
        (scheduler.idle, scheduler.idle_bytes),
        (scheduler.recalled, scheduler.recalled_bytes),
    ):
        assert nbytes == sum(s.reserved_kv_bytes for s in everyone if s.session_id in kept)
        assert {*kept} <= {s.session_id for s in everyone}
    for session in everyone:
        places = scheduler.live, scheduler.idle, scheduler.waiting
        assert sum(session.session_id in place for place in places) == 1
        if session.state is State.IDLE:
            assert session.cache is not None and session.turn_id not in held.turns
            assert (session.slot, session.in_flight, session.view_bytes) == (None, 0, 0)
            assert session.cache.tokens == session.cache.capacity <= session.total_tokens
            assert session.reserved_kv_bytes == kept_bytes(model, session.cache.tokens)
            continue
        assert held.turns[session.turn_id] == session.session_id
        if session.slot is not None:
            assert session.cache is not None
            ahead = session.in_flight - 1 if session.turn_generated else 0
            assert session.cache.tokens == session.total_tokens + ahead


class Talk:
    """A conversation under way in the crowded engine."""

    def __init__(self, running: Engine, turns: list[tuple[Any, Made]], trouble: str) -> None:
        self._running = running
        self._turns = turns
        self._trouble = trouble  # to come in its last turn
        self._session_id: str | None = None
        self._next = 0
        self.compared: list[tuple[Made, Made]] = []
        self._begin()

    def _begin(self) -> None:
        asked, _ = self._turns[self._next]
        task = GenerateTask(**asked, keep=True, continues=self._session_id)
        self._made = Made()
        self._turn_id, self._inbox = submit(self._running, task)
        self._session_id = self._session_id or self._turn_id

    def go_on(self) -> bool:
        """Takes the next event, if there is one. False once the conversation is over."""
        try:
            event = self._inbox.events.get(timeout=0.001)
        except queue.Empty:  # others may be what it waits for
            return True
        self._made.take(event)
        last = self._next == len(self._turns) - 1
        if last and self._trouble == "cancel" and isinstance(event, TokensMade):
            self._running.cancel(self._turn_id)
            return False
        if last and self._trouble == "close" and isinstance(event, Admitted):
            self._running.close(str(self._session_id))
        if self._made.end is None:
            return True
        return self._end_turn(last)

    def _end_turn(self, last: bool) -> bool:
        made, alone = self._made, self._turns[self._next][1]
        error = made.end.error if isinstance(made.end, Failed) else None
        if isinstance(error, SessionClosed | SessionNotFound):  # it was closed, or gave way
            assert made.ids == alone.ids[: len(made.ids)]
            return False
        made.holds = tokens_of(self._running, str(self._session_id))
        self.compared.append((made, alone))
        if last or error is not None:
            return False
        self._next += 1
        self._begin()
        return True


@pytest.mark.parametrize("count", CONVERSATIONS)
@pytest.mark.parametrize("local_prefill_max_tokens", [None, 0])
@pytest.mark.parametrize(("overlap", "batch_invariant"), [(True, False), (False, True)])
def test_conversations_in_a_crowd_are_what_they_are_alone(
    overlap: bool,
    batch_invariant: bool,
    local_prefill_max_tokens: int | None,
    count: int,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = random.Random(f"{overlap} {local_prefill_max_tokens}")
    how = {"selection": Selection(density=0.5), "batch_invariant": batch_invariant}
    planned = [conversation(model, draw, **how) for _ in range(count)]
    room = 5 * kv_bytes(model.decoder.spec, torch.float32, 256)
    limits = Limits(max_sessions=5, session_bytes=room, idle_bytes=room, max_queue=100)
    source = Loopback()
    crowd = Engine(
        model,
        limits=limits,
        sharing="private",
        overlap=overlap,
        prefill_source=source,
        local_prefill_max_tokens=local_prefill_max_tokens,
        **how,
    )
    source.reader = crowd
    wrong: list[AssertionError] = []
    step, sample = EngineLoop.step, Sampler.sample

    def checked_step(loop: EngineLoop) -> None:
        step(loop)  # which ends a turn of the engine
        try:
            check_books(take_snapshot(loop.parts), limits, model)
        except AssertionError as error:
            wrong.append(error)

    def failing_sample(self: Sampler, logits: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        """Several rows together fail now and then: each is then tried alone."""
        if logits.shape[0] > 1 and draw.random() < 0.1:
            raise RuntimeError("several rows")
        return sample(self, logits, *more)

    monkeypatch.setattr(EngineLoop, "step", checked_step)
    monkeypatch.setattr(Sampler, "sample", failing_sample)
    crowd.start()
    compared: list[tuple[Made, Made]] = []
    try:
        crowd.ready.result(30)
        under_way: list[Talk] = []
        while planned or under_way:
            while planned and len(under_way) < 10:
                trouble = draw.choice(("none", "none", "none", "cancel", "close"))
                under_way.append(Talk(crowd, planned.pop(), trouble))
            for talk in list(under_way):
                if not talk.go_on():
                    under_way.remove(talk)
                    compared += talk.compared
    finally:
        crowd.stop()
    assert wrong == []
    assert len(compared) > count / 2
    for made, alone in compared:
        assert made.equals(alone, to_the_bit=batch_invariant), (made, alone)
