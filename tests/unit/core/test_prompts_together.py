"""Several prompts in one pass: each comes out as it does alone, and none waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from griffin_core.backends.base import Backend
from griffin_core.engine import loop
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Failed, Finished, PrefillBegun
from griffin_core.engine.ports import Observer
from griffin_core.engine.prefill_queue import PrefillQueue
from griffin_core.engine.prefill_run import PrefillRun
from griffin_core.engine.task import GenerateTask
from griffin_core.errors import EngineFault
from griffin_core.experts.policies import POLICIES
from griffin_core.experts.selection import Selection
from griffin_core.forward.events import (
    LayerActivations,
    LayerExperts,
    LayerKv,
    PrefillFinished,
    PromptExperts,
)
from griffin_core.forward.prefill import MAX_TOGETHER, launch
from griffin_core.forward.prompt import (
    Part,
    Prompt,
)
from griffin_core.forward.prompt_pass import Pass, PromptRead
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from tests.tiny import FAMILIES, VOCABULARY
from tests.unit.core.engines import Inbox, complete, engine, finish, submit

HALF = Selection(density=0.5)


def ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + count)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def alone(decoder: Decoder, prompt: Prompt) -> PromptRead:
    (read,) = launch(decoder, [Part(prompt=prompt, tokens=prompt.left)]).end()
    return read


def assert_same(one: PromptRead, other: PromptRead) -> None:
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(one.statistics.s2.sqrt(), other.statistics.s2.sqrt())
    close(one.statistics.sums[1:], other.statistics.sums[1:], rtol=1e-4, atol=1e-4)
    assert one.statistics.tokens == other.statistics.tokens
    close(one.finished.last_hidden, other.finished.last_hidden)
    assert torch.equal(one.slim.experts, other.slim.experts)
    assert one.norm_mass == pytest.approx(other.norm_mass, abs=1e-5)
    length = one.prompt.cache.length
    assert length == other.prompt.cache.length
    for layer in range(len(one.slim.counts)):
        close(*(each.prompt.cache.slice(layer, 0, length) for each in (one, other)))


# -- a pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_prompt_of_a_pass_is_what_it_is_alone(name: str, tiny: Callable[[str], Model]) -> None:
    """Ragged lengths from one token on, in every family; one has a turn before, one comes in two
    parts."""
    decoder = tiny(name).decoder
    lengths = (1, 23, 40, 9, 31)

    def prompts() -> list[Prompt]:
        made = [Prompt(decoder, ids(length, 1), HALF) for length in lengths]
        first = Prompt(decoder, ids(12, 2), HALF, cache=decoder.new_cache(12 + 17))
        before = alone(decoder, first)
        made.append(
            Prompt(decoder, ids(17, 3), HALF, cache=first.cache, statistics=before.statistics)
        )
        return made

    expected = [alone(decoder, prompt) for prompt in prompts()]
    together = prompts()
    cut = together[2]
    parts = [Part(prompt=p, tokens=p.left if p is not cut else 15) for p in together]
    read = {id(each.prompt): each for each in launch(decoder, parts).end()}
    assert len(read) == 5 and id(cut) not in read
    other = Prompt(decoder, ids(8, 4), HALF)  # another, beside the second part
    parts = [Part(prompt=other, tokens=8), Part(prompt=cut, tokens=cut.left)]
    read |= {id(each.prompt): each for each in launch(decoder, parts).end()}
    for prompt, exact in zip(together, expected, strict=True):
        assert_same(read[id(prompt)], exact)


@torch.inference_mode()
def test_each_prompt_has_the_experts_of_its_own_selection(
    tiny: Callable[[str], Model],
) -> None:
    decoder = tiny("llama").decoder
    selections = [Selection(density=0.5, policy=policy, seed=3) for policy in POLICIES]
    selections += [Selection(density=density) for density in (0.25, 0.5, 1.0, 1.0)]
    prompts = [Prompt(decoder, ids(20, n), each) for n, each in enumerate(selections)]
    parts = [Part(prompt=prompt, tokens=20) for prompt in prompts]
    for n, (read, selection) in enumerate(
        zip(launch(decoder, parts).end(), selections, strict=True)
    ):
        exact = alone(decoder, Prompt(decoder, ids(20, n), selection))
        assert torch.equal(read.slim.experts, exact.slim.experts)
        assert (read.norm_mass == (1.0, 1.0, 1.0)) is (selection.density == 1.0)


@torch.inference_mode()
def test_a_prompt_is_told_of_what_it_asked_for(tiny: Callable[[str], Model]) -> None:
    decoder = tiny("llama").decoder
    kv, watched, neither = (
        Prompt(decoder, ids(n), HALF, wants_kv=n == 5, watch={1} if n == 7 else ())
        for n in (5, 7, 3)
    )
    told: list[tuple[Prompt, Any]] = []
    parts = [Part(prompt=each, tokens=each.left) for each in (kv, watched, neither)]
    launch(decoder, parts, lambda prompt, event: told.append((prompt, event))).end()
    assert [event.layer for prompt, event in told if prompt is kv] == [0, 1, 2]
    assert all(isinstance(event, LayerKv) for prompt, event in told if prompt is kv)
    ((_, activations),) = [each for each in told if each[0] is watched]
    assert isinstance(activations, LayerActivations) and activations.values.shape == (7, 88)
    assert all(prompt is not neither for prompt, _ in told)


@torch.inference_mode()
def test_the_time_of_a_pass_is_divided_by_tokens(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny("llama").decoder
    clock = iter((0.0, 4.0, 3.0, 3.5))  # begin, end, before and after the selection
    monkeypatch.setattr(Backend, "timestamp", lambda backend: next(clock))
    parts = [Part(prompt=Prompt(decoder, ids(n), HALF), tokens=n) for n in (10, 30)]
    short, long = (each.finished for each in launch(decoder, parts).end())
    assert (short.selection_s, long.selection_s) == (0.25, 0.25)
    assert (short.compute_s, long.compute_s) == (0.75 + 0.25, 2.25 + 0.25)


# -- the queue -------------------------------------------------------------------------------------


class Passes:
    """A queue, and what its passes read: of each pass the tokens of each prompt by its name."""

    def __init__(self, model: Model, chunk_tokens: int) -> None:
        self.decoder = model.decoder
        self.queue = PrefillQueue(
            model.decoder, max_waiting=100, chunk_tokens=chunk_tokens, observer=Observer()
        )
        self.read: list[dict[str, int]] = []
        self.names: dict[int, str] = {}
        self.fails: Callable[[dict[str, int]], bool] = lambda _: False
        self.during: Callable[[], None] = lambda: None
        self.queue.launch = self._launch

    def _launch(self, decoder: Decoder, parts: Any, tell: Any) -> Any:
        self.read.append({self.names[id(part.prompt)]: part.tokens for part in parts})
        if self.fails(self.read[-1]):
            parts = [*parts, Part(prompt=parts[0].prompt, tokens=10**6)]  # more than there are
        self.during()
        return launch(decoder, parts, tell)

    def add(
        self,
        name: str,
        tokens: int,
        *,
        admitted: bool = True,
        make: Callable[[], Prompt] | None = None,
        **more: Any,
    ) -> Any:
        """A prompt; its sink."""
        inbox = Inbox()

        def usual() -> Prompt:
            prompt = Prompt(self.decoder, ids(tokens), HALF, wants_kv=not admitted)
            self.names[id(prompt)] = name
            return prompt

        inbox.run = PrefillRun(make or usual, inbox, tokens=tokens, admitted=admitted, **more)
        self.queue.add(inbox.run, lambda owner: 0.0)
        return inbox

    def all(self) -> list[dict[str, int]]:
        """Runs passes until there is nothing to do."""
        with torch.inference_mode():
            while self.queue.has_work:
                self.queue.run_pass()
        return self.read

    def run_pass(self) -> dict[str, int]:
        with torch.inference_mode():
            self.queue.run_pass()
        return self.read[-1]


def events(inbox: Inbox) -> list[Any]:
    """All it got."""
    got = []
    while not inbox.events.empty():
        got.append(inbox.events.get())
    return got


Make = Callable[[int], Passes]


@pytest.fixture
def passes(tiny: Callable[[str], Model]) -> Make:
    return partial(Passes, tiny("llama-long"))


def test_waiting_prompts_share_passes_up_to_the_chunk_size(passes: Make) -> None:
    queue = passes(32)
    for name in "abcde":
        queue.add(name, 12)
    assert queue.all() == [
        {"a": 12, "b": 12, "c": 8},
        {"c": 4, "d": 12, "e": 12},
    ]


def test_a_long_prompt_alone_has_whole_passes(passes: Make) -> None:
    queue = passes(32)
    queue.add("long", 80)
    assert queue.all() == [{"long": 32}, {"long": 32}, {"long": 16}]


def test_a_short_prompt_is_in_the_first_pass_after_it_came(passes: Make) -> None:
    queue = passes(512)
    for name in "abc":
        queue.add(name, 4000)
    queue.run_pass()
    short = queue.add("short", 64)
    assert queue.run_pass()["short"] == 64
    assert isinstance(events(short)[-1], PrefillFinished)


def test_owners_take_turns_at_the_places_for_prompts_of_others(passes: Make) -> None:
    """One that sends many prompts has all places only while nobody else wants one."""
    queue = passes(32)
    many = {"admitted": False, "max_concurrent": 2}
    for n in range(4):
        queue.add(f"a{n}", 100, owner="a", **many)
    queue.run_pass()
    queue.add("b0", 100, owner="b", **many)
    queue.add("c0", 100, owner="c", **many)
    begun = list(dict.fromkeys(name for read in queue.all() for name in read))
    assert begun == ["a0", "b0", "c0", "a1", "a2", "a3"]


def test_an_owner_leaves_room_in_the_queue_for_others(tiny: Callable[[str], Model]) -> None:
    def refused(*names: str) -> list[str]:
        queue = Passes(tiny("llama-long"), 32)
        queue.queue = PrefillQueue(
            queue.decoder, max_waiting=4, chunk_tokens=32, observer=Observer()
        )
        added = {name: queue.add(name, 10, admitted=False, owner=name[0]) for name in names}
        return [
            name
            for name, inbox in added.items()
            if any(isinstance(event, Failed) for event in events(inbox))
        ]

    alone = ["a0", "a1", "a2", "a3", "a4", "a5"]
    assert refused(*alone) == ["a5"]
    assert refused("b0", *alone) == ["a3", "a4", "a5"]
    assert refused("b0", "a0", "a1", "a2", "b1", "b2") == ["b2"]


def test_short_prompts_that_keep_coming_leave_a_long_one_half_of_every_pass(
    passes: Make,
) -> None:
    queue = passes(32)
    queue.add("long", 320)
    for number in range(20):
        for name in "ab":
            queue.add(f"{name}{number}", 16)
        queue.run_pass()
    assert sum(each.get("long", 0) for each in queue.read) == 320
    beside = queue.read[: 1 + max(n for n, each in enumerate(queue.read) if "long" in each)]
    assert all(each["long"] >= 16 and sum(each.values()) == 32 for each in beside)
    assert sum(len(each) == 2 for each in beside) >= len(beside) - 1


def test_among_shorter_ones_that_keep_coming_no_prompt_waits_for_ever(passes: Make) -> None:
    """Each becomes the first in time, and from then on has half of every pass."""
    queue = passes(32)
    for name in "abc":
        queue.add(name, 64)
    for number in range(13):
        queue.add(f"short{number}", 16)
        queue.add(f"shorter{number}", 15)
        queue.run_pass()
    for name in "abc":
        assert sum(each.get(name, 0) for each in queue.read) == 64


def test_a_pass_has_a_bounded_number_of_prompts(passes: Make) -> None:
    queue = passes(512)
    for number in range(MAX_TOGETHER + 5):
        queue.add(str(number), 2)
    assert [len(each) for each in queue.all()] == [MAX_TOGETHER, 5]


def test_a_reader_that_is_not_ready_joins_no_pass_and_delays_no_other(passes: Make) -> None:
    queue = passes(32)
    slow, fast = queue.add("slow", 40, admitted=False), queue.add("fast", 40, admitted=False)
    slow.open = False
    assert queue.all() == [{"fast": 32}, {"fast": 8}]
    assert isinstance(events(fast)[-1], PrefillFinished) and not events(slow)
    slow.open = True
    assert queue.all()[2:] == [{"slow": 32}, {"slow": 8}]


def test_prompts_without_a_reservation_begin_up_to_their_bound(passes: Make) -> None:
    queue = passes(100)
    for name in "abc":
        queue.add(name, 60, admitted=False, max_concurrent=2)
    queue.add("session", 5)
    assert queue.all()[0] == {"a": 60, "b": 35, "session": 5}
    assert queue.read[1] == {"b": 25, "c": 60}


def test_a_cancelled_prompt_gets_no_more_and_leaves_the_next_pass(passes: Make) -> None:
    queue = passes(32)
    gone, stays = queue.add("gone", 60, admitted=False), queue.add("stays", 60, admitted=False)
    assert queue.run_pass() == {"gone": 32}
    queue.during = gone.run.cancel
    queue.run_pass()
    got = len(events(gone))
    assert got == 1 + 3  # begun, and the first pass's layers
    assert all("gone" not in each for each in queue.all()[2:])
    assert not events(gone) and isinstance(events(stays)[-1], PrefillFinished)


def test_a_pass_that_fails_ends_the_guilty_prompt_alone(
    passes: Make, caplog: pytest.LogCaptureFixture
) -> None:
    queue = passes(100)
    queue.fails = lambda read: "bad" in read
    inboxes = {name: queue.add(name, 20, admitted=False) for name in ("a", "bad", "c")}
    together, *each_alone = queue.all()
    assert together == {"a": 20, "bad": 20, "c": 20}
    assert each_alone == [{"a": 20}, {"bad": 20}, {"c": 20}]
    for name, inbox in inboxes.items():
        got = events(inbox)
        if name == "bad":
            assert isinstance(got[-1], Failed) and isinstance(got[-1].error, EngineFault)
        else:
            layers = [event.layer for event in got if isinstance(event, LayerKv)]
            assert layers == [0, 1, 2]  # none of them twice
            assert isinstance(got[-1], PrefillFinished)
    assert "each is tried alone" in caplog.text


def test_no_layer_is_told_twice_of_a_prompt_whose_pass_failed_half_way(
    passes: Make, monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], Model]
) -> None:
    decoder = tiny("llama-long").decoder
    layer = Decoder.layer
    monkeypatch.setattr(
        Decoder,
        "layer",
        lambda self, index, x, *rest: (
            1 // 0 if index == 2 and len(x) == 21 else layer(self, index, x, *rest)
        ),
    )
    queue = passes(100)
    inboxes = [queue.add(name, tokens, admitted=False) for name, tokens in (("a", 9), ("b", 12))]
    queue.all()
    for inbox, tokens in zip(inboxes, (9, 12), strict=True):
        got = events(inbox)
        assert [event.layer for event in got if isinstance(event, LayerKv)] == [0, 1, 2]
        with torch.inference_mode():
            exact = alone(decoder, Prompt(decoder, ids(tokens), HALF))
        torch.testing.assert_close(
            torch.stack([event.s2 for event in got if isinstance(event, LayerExperts)]).sqrt(),
            exact.statistics.s2.sqrt(),
        )


def test_a_prompt_without_memory_fails_alone(passes: Make) -> None:
    queue = passes(100)
    poor = queue.add("poor", 10, make=lambda: 1 // 0)
    rich = queue.add("rich", 10)
    assert queue.all() == [{"rich": 10}]
    assert isinstance(events(poor)[-1], Failed)
    assert isinstance(events(rich)[-1], PrefillFinished)


def test_the_ends_of_a_pass_come_together_and_last(passes: Make) -> None:
    queue = passes(100)
    order: list[tuple[str, str]] = []
    for name, admitted in (("a", True), ("b", False), ("c", True)):
        inbox = queue.add(name, 20, admitted=admitted)
        inbox.put = lambda event, name=name: order.append((name, type(event).__name__))
    queue.all()
    assert order[-3:] == [(name, "PrefillFinished") for name in "abc"]
    assert order[:3] == [(name, "PrefillBegun") for name in "abc"]
    middle = [kind for name, kind in order[3:-3] if name == "b"]
    assert middle == ["LayerKv"] * 3 + ["LayerExperts"] * 3
    for own in "ac":  # its KV is where it belongs, so that layers are of no interest
        assert [kind for name, kind in order[3:-3] if name == own] == [PromptExperts.__name__]


def test_the_wait_for_the_first_pass_is_told(passes: Make) -> None:
    queue = passes(100)
    begun = queue.add("a", 5)
    queue.all()
    first = events(begun)[0]
    assert isinstance(first, PrefillBegun) and 0 <= first.queue_s < 60


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts in each pass."""
    sizes: list[int] = []
    end = Pass.end

    def noted(self: Pass) -> list[PromptRead]:
        sizes.append(len(self.parts))
        return end(self)

    monkeypatch.setattr(Pass, "end", noted)
    return sizes


def test_an_idle_engine_waits_a_moment_for_prompts_that_were_announced(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(loop, "GATHER_S", 5.0)
    monkeypatch.setattr(loop, "ANNOUNCED_S", 5.0)
    with engine(tiny("llama"), prefill_source=None) as running:
        inboxes = []
        for _ in range(3):
            running.arrivals.announce()
        for number in range(3):
            time.sleep(0.05)
            task = GenerateTask(prompt=(1, 2, number), stopping=StoppingParams(max_tokens=1))
            inboxes.append(submit(running, task)[1])
            running.arrivals.settle()
        for inbox in inboxes:
            assert isinstance(finish(inbox)[1], Finished)
    assert sizes == [3]


def test_after_a_crowd_an_idle_engine_waits_for_the_next_one(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    """And after a prompt that came alone it does not."""
    monkeypatch.setattr(loop, "GATHER_S", 5.0)
    monkeypatch.setattr(loop, "CROWD_S", 1.0)

    def together(running: Engine, count: int, apart_s: float) -> float:
        inboxes, begin = [], time.monotonic()
        for number in range(count):
            task = GenerateTask(prompt=(1, 2, number), stopping=StoppingParams(max_tokens=1))
            inboxes.append(submit(running, task)[1])
            time.sleep(apart_s)
        for inbox in inboxes:
            assert isinstance(finish(inbox)[1], Finished)
        return time.monotonic() - begin

    with engine(tiny("llama"), prefill_source=None) as running:
        running.arrivals.announce()  # so that the first pass has them all
        together(running, 3, 0.0)
        running.arrivals.settle()
        together(running, 3, 0.1)
        assert sizes == [3, 3]
        assert together(running, 1, 0.0) >= 1.0  # nobody came
        assert together(running, 1, 0.0) < 1.0


def test_an_engine_does_not_wait_for_long_for_what_never_comes(
    tiny: Callable[[str], Model],
) -> None:
    with engine(tiny("llama"), prefill_source=None) as running:
        running.arrivals.announce()
        task = GenerateTask(prompt=(1, 2), stopping=StoppingParams(max_tokens=1))
        assert isinstance(complete(running, task)[1], Finished)
