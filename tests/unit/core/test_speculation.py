"""Speculation: a request's tokens are those that it gets without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from griffin_core.engine.dense_passes import DensePasses
from griffin_core.engine.events import Failed, Finished, TokensMade
from griffin_core.engine.generation import Generation
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.errors import InvalidRequest
from griffin_core.forward.decode import EagerStep
from griffin_core.model.load import Model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.prompt_lookup import PromptLookup
from griffin_core.sampling.speculation import (
    Acceptance,
    SpeculationParams,
    best_length,
    draft_lengths,
)
from griffin_core.sampling.stopping import StoppingParams
from tests.unit.core.engines import Inbox, at_baseline, complete, engine, finish, submit

DRAW = torch.Generator().manual_seed(3)
SNIPPET = torch.randint(0, 250, (12,), generator=DRAW).tolist()
PROMPT = (*SNIPPET, 5, 6, *SNIPPET, 9, *SNIPPET[:6])

SAMPLINGS: dict[str, Any] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 4},
    "cut": {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "seed": 5},
    "penalized": {
        "temperature": 0.7,
        "seed": 6,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
    },
    "greedy, penalized": {"frequency_penalty": 0.6},
    "biased": {"temperature": 0.9, "seed": 7, "logit_bias": {11: 4.0, 12: 3.0}},
    "bad words": {"seed": 8, "temperature": 0.5, "bad_words_ids": ((11, 12), (40,))},
    "two": {"allowed_token_ids": frozenset({20, 21})},
    "two, sampled": {"temperature": 0.3, "seed": 3, "allowed_token_ids": frozenset({20, 21})},
    "few": {"seed": 9, "temperature": 0.9, "allowed_token_ids": frozenset(range(20, 26))},
}

WAYS: dict[str, Any] = {
    "lookup": {"mode": "lookup"},
    "lookup of 3": {"mode": "lookup", "draft_tokens": 3},
    "slim": {"mode": "slim"},
    "slim of 7": {"mode": "slim", "draft_tokens": 7},
    "auto": {"mode": "auto"},
    "auto, dense": {"mode": "auto", "verify": "dense"},
}


def made(speculation: dict[str, Any], sampling: Any = "greedy", **options: Any) -> GenerateTask:
    return GenerateTask(
        **{
            "prompt": PROMPT,
            "sampling": SamplingParams(**SAMPLINGS[sampling]),
            "stopping": StoppingParams(max_tokens=40, ignore_eos=True),
            "speculation": SpeculationParams(**speculation),
            "top_logprobs": 3,
            **options,
        }
    )


def shown(inbox: Inbox) -> tuple[list[int], list[Any], Any]:
    ids: list[int] = []
    logprobs: list[Any] = []
    while not isinstance(event := inbox.until(TokensMade, Finished), Finished):
        ids += event.ids
        logprobs += event.logprobs
    return ids, logprobs, event


def without(task: GenerateTask) -> GenerateTask:
    """The same request, dense if it verifies dense, without speculation."""
    pruning = PruningParams(density=1.0) if task.speculation.lossless else task.pruning
    return replace(
        task, speculation=SpeculationParams(), pruning=pruning, turn_id=task.turn_id + "-plain"
    )


def assert_same(plain: Any, drafted: Any) -> None:
    assert drafted[0] == plain[0]
    for one, other in zip(plain[1], drafted[1], strict=True):
        assert other.chosen == pytest.approx(one.chosen, abs=2e-4)
        assert [token for token, _ in other.top] == [token for token, _ in one.top]
    assert drafted[2].reason == plain[2].reason
    assert drafted[2].generated_tokens == plain[2].generated_tokens


@pytest.mark.parametrize(
    ("density", "overlap"), [(1.0, False), (0.5, True)], ids=["dense", "half, overlap"]
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_tokens_and_logprobs_are_those_without(
    sampling: str, way: str, density: float, overlap: bool, tiny: Callable[[str], Model]
) -> None:
    task = made(WAYS[way], sampling, pruning=PruningParams(density=density))
    with engine(tiny("llama"), overlap=overlap) as running:
        plain = shown(submit(running, without(task))[1])
        drafted = shown(submit(running, task)[1])
        assert_same(plain, drafted)
        assert at_baseline(running)
        assert running.snapshot().result(30).slots_in_use == frozenset()


@pytest.mark.parametrize("name", ["gemma3_text", "opt", "mistral", "qwen3"])
@pytest.mark.parametrize("way", ["lookup", "slim"])
def test_so_they_are_in_every_family(way: str, name: str, tiny: Callable[[str], Model]) -> None:
    task = made(WAYS[way], pruning=PruningParams(density=0.5))
    with engine(tiny(name)) as running:
        plain = shown(submit(running, without(task))[1])
        drafted = shown(submit(running, task)[1])
        assert_same(plain, drafted)


def test_many_sessions_draft_each_its_own_number_in_a_changing_batch(
    tiny: Callable[[str], Model],
) -> None:
    tasks = []
    for number in range(24):
        way = list(WAYS)[number % len(WAYS)]
        sampling = list(SAMPLINGS)[number % len(SAMPLINGS)]
        tasks.append(
            made(
                WAYS[way] if number % 5 else {},
                sampling,
                prompt=PROMPT[number % 7 :],
                pruning=PruningParams(density=0.5 if number % 3 else 1.0),
                stopping=StoppingParams(max_tokens=10 + 3 * number, ignore_eos=True),
            )
        )
    with engine(tiny("llama"), overlap=True) as running:
        plain = [shown(submit(running, without(task))[1]) for task in tasks]
        inboxes = [submit(running, task)[1] for task in tasks]
        for expected, inbox in zip(plain, inboxes, strict=True):
            assert_same(expected, shown(inbox))
        assert at_baseline(running)


def test_drafts_are_accepted_and_counted(tiny: Callable[[str], Model]) -> None:
    """What is drawn from two tokens soon repeats itself."""
    long = StoppingParams(max_tokens=120, ignore_eos=True)
    with engine(tiny("llama")) as running:
        _, finished = complete(running, made({"mode": "lookup"}, "two", stopping=long))
        figures = finished.speculation
        assert 50 < figures.lookup_accepted <= figures.lookup_drafted
        assert figures.slim_drafted == 0
        task = made({"mode": "slim"}, stopping=long, pruning=PruningParams(density=0.9))
        _, finished = complete(running, task)
        figures = finished.speculation
        assert 0 < figures.slim_accepted <= figures.slim_drafted
        assert figures.lookup_drafted == 0
        assert finished.pruning.mean_density == 1
        _, finished = complete(running, without(task))
        assert finished.speculation.slim_drafted == 0


@pytest.mark.parametrize("way", ["lookup", "slim"])
@pytest.mark.parametrize("stop", ["token", "string", "length", "context"])
def test_a_completion_ends_where_it_ends_without(
    way: str, stop: str, tiny: Callable[[str], Model]
) -> None:
    model = tiny("llama")
    task = made(WAYS[way], pruning=PruningParams(density=0.8), keep=True)
    with engine(model) as running:
        probe = replace(without(task), keep=False, turn_id="probe")
        tokens, _ = complete(running, probe)
        stopping = {
            "token": StoppingParams(max_tokens=40, stop_token_ids=frozenset({tokens[17]})),
            "string": StoppingParams(max_tokens=40, stop=(model.tokenizer.decode(tokens[9:12]),)),
            "length": StoppingParams(max_tokens=13, ignore_eos=True),
            "context": StoppingParams(max_tokens=10_000, ignore_eos=True),
        }[stop]
        task = replace(task, stopping=stopping)
        kept = []
        found = []
        for each in (without(task), task):
            session_id, inbox = submit(running, each)
            kept.append(session_id)
            found.append(shown(inbox))
        assert_same(*found)
        if stop != "context":
            found = []
            for session_id, each in zip(kept, (without(task), task), strict=True):
                later = replace(
                    each,
                    prompt=(3, 4),
                    continues=session_id,
                    keep=False,
                    turn_id=f"after {session_id}",
                )
                found.append(shown(submit(running, later)[1]))
            assert_same(*found)
        for session_id in kept if stop == "context" else ():
            running.close(session_id).result(30)
        assert at_baseline(running)


def test_a_draft_that_fails_ends_nobody(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = made(WAYS["slim"], "penalized", pruning=PruningParams(density=0.5))
    with engine(tiny("llama")) as running:
        plain = shown(submit(running, without(task))[1])
        fails = Counter[str]()

        def fail(*_: Any) -> Any:
            fails["drafts"] += 1
            raise RuntimeError("no draft")

        name = "griffin_core.engine.speculative_steps.slim_step"
        monkeypatch.setattr(name, fail)
        assert_same(plain, shown(submit(running, task)[1]))
        assert fails["drafts"] > 3 and at_baseline(running)


def test_bans_that_leave_no_token_in_a_draft_end_that_request_alone(
    tiny: Callable[[str], Model],
) -> None:
    """What is drawn must be 20 or 21, and after a while none of both is left."""
    sampling = SamplingParams(
        allowed_token_ids=frozenset({20, 21}), bad_words_ids=((21, 21), (20, 20), (21, 20, 21))
    )
    prompt = (20, 21, 20, 30, 31, 9, 20)
    with engine(tiny("llama")) as running:
        other = submit(running, made({}, prompt=(1, 2, 3)))[1]
        for way in ({}, WAYS["lookup"], WAYS["slim"]):
            task = made(way, prompt=prompt)
            failed = submit(running, replace(task, sampling=sampling))[1].until(Finished)
            assert isinstance(failed, Failed) and isinstance(failed.error, InvalidRequest)
            assert "no token left to draw" in str(failed.error)
        assert shown(other)[2].generated_tokens == 40
        assert at_baseline(running)


def test_draws_that_fail_one_by_one_are_not_drawn_again(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step has drawn for the others by then, and they must not run it twice."""
    few = {"prompt": (20, 21) * 8, "stopping": StoppingParams(max_tokens=30, ignore_eos=True)}
    drafts = made(WAYS["lookup"], "two", **few)
    drafts = replace(drafts, sampling=replace(drafts.sampling, frequency_penalty=0.01))

    ban = Generation.ban

    def fail(self: Generation, session: Any, sampler: Any, ahead: Any = ()) -> None:
        if ahead:
            raise MemoryError("no bans")
        ban(self, session, sampler, ahead)

    monkeypatch.setattr(Generation, "ban", fail)
    with engine(tiny("llama")) as running:
        tasks = [replace(task, turn_id=f"turn {n}") for n, task in enumerate((drafts, drafts))]
        inboxes = [submit(running, task)[1] for task in tasks]
        for inbox in inboxes:
            assert isinstance(inbox.until(Finished), Failed)
        assert at_baseline(running)
        monkeypatch.undo()
        assert complete(running, drafts)[1].generated_tokens == 30


@pytest.mark.parametrize("boundary", [{"warmup_tokens": 60}, {"checks": True}])
def test_drafts_end_where_a_session_pauses(
    boundary: dict[str, Any], tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the experts are chosen from the same tokens, and the tokens are the same."""
    monkeypatch.setattr(DensePasses, "interval", lambda *_: 32)
    pruning = PruningParams(density=0.5, correction="none", **boundary)
    stopping = StoppingParams(max_tokens=90, ignore_eos=True)
    with engine(tiny("llama")) as running:
        for sampling in ("two", "two, sampled"):
            task = made(WAYS["lookup"], sampling, pruning=pruning, stopping=stopping)
            plain = shown(submit(running, without(task))[1])
            drafted = shown(submit(running, task)[1])
            assert_same(plain, drafted)
            assert drafted[2].speculation.lookup_accepted > 10
            for name in ("checked_tokens", "agreed_tokens", "dense_tokens"):
                figures = plain[2].pruning, drafted[2].pruning
                assert getattr(figures[0], name) == getattr(figures[1], name)


def test_a_step_has_no_more_rows_than_pay(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    launch = EagerStep.launch

    def counted(self: EagerStep, sequences: Any, tops: Any) -> Any:
        rows.append(sum(len(each.token_ids) for each in sequences))
        return launch(self, sequences, tops)

    monkeypatch.setattr(EagerStep, "launch", counted)
    monkeypatch.setattr(EagerStep, "most_rows", 6)
    with engine(tiny("llama")) as running:
        tasks = [made(WAYS["lookup"], "two", turn_id=f"turn {number}") for number in range(3)]
        inboxes = [submit(running, task)[1] for task in tasks]
        for inbox in inboxes:
            assert shown(inbox)[2].speculation.lookup_accepted > 0
    assert max(rows) == 6


def test_what_comes_after_the_end_is_not_accepted(tiny: Callable[[str], Model]) -> None:
    with engine(tiny("llama")) as running:
        for tokens in range(14, 24):
            stopping = StoppingParams(max_tokens=60, stop_token_ids=frozenset(), ignore_eos=True)
            task = made(WAYS["lookup"], "two", stopping=replace(stopping, max_tokens=tokens))
            _, finished = complete(running, task)
            assert finished.speculation.lookup_accepted < finished.generated_tokens == tokens


def test_a_later_turn_takes_over_what_was_asked(tiny: Callable[[str], Model]) -> None:
    """And not the density at which a lossless turn ran."""
    few = StoppingParams(max_tokens=6, ignore_eos=True)
    lossless = {"mode": "lookup", "verify": "dense"}
    pruning = PruningParams(density=0.5, checks=True)
    with engine(tiny("llama")) as running:
        first = made(lossless, pruning=pruning, stopping=few, keep=True)
        session_id, inbox = submit(running, first)
        assert shown(inbox)[2].pruning.mean_density == 1
        long = StoppingParams(max_tokens=50, ignore_eos=True)
        later = GenerateTask(prompt=(5, 6), continues=session_id, stopping=long)
        _, finished = complete(running, later)
        assert finished.pruning.density == 0.5 and finished.pruning.mean_density < 1
        assert finished.pruning.checked_tokens == 32


def test_a_session_that_goes_away_among_drafts_leaves_nothing(
    tiny: Callable[[str], Model],
) -> None:
    with engine(tiny("llama")) as running:
        for count in range(6):
            turn, inbox = submit(running, made(WAYS["lookup"]))
            for _ in range(count):
                inbox.get()
            running.cancel(turn)
        finish(submit(running, made(WAYS["slim"]))[1])
        assert at_baseline(running)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"mode": "eagle"}, "speculation: "),
        ({"mode": "lookup", "verify": "both"}, "verify: "),
        ({"mode": "slim", "verify": "experts"}, "verify: "),
        ({"mode": "lookup", "draft_tokens": 0}, "draft_tokens: "),
        ({"mode": "lookup", "draft_tokens": 17}, "draft_tokens: "),
        ({"mode": "off", "verify": "dense"}, "verify: got dense with speculation off"),
        ({"mode": "off", "draft_tokens": 3}, "draft_tokens: got 3 with speculation off"),
    ],
)
def test_what_cannot_be_is_refused(given: Any, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        SpeculationParams(**given)


def test_a_batch_invariant_engine_refuses(tiny: Callable[[str], Model]) -> None:
    with engine(tiny("llama"), batch_invariant=True) as running:
        failed = submit(running, made(WAYS["lookup"]))[1].until()
        assert isinstance(failed.error, InvalidRequest)
        assert "off on a server with --batch-invariant" in str(failed.error)


# -- what is drafted ---------------------------------------------------------------------------


def looked_up_plainly(tokens: list[int], most: int) -> tuple[int, ...]:
    best, after = 1, 0
    for end in range(1, len(tokens)):
        matched = 0
        while matched < min(end, 16) and tokens[end - 1 - matched] == tokens[-1 - matched]:
            matched += 1
        if matched >= max(best, 2):
            best, after = matched, end
    return tuple(tokens[after : after + most]) if after else ()


def test_a_lookup_finds_the_longest_run_that_stood_last() -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(300):
        length = int(torch.randint(1, 60, (1,), generator=draw))
        tokens = torch.randint(0, 3, (length,), generator=draw).tolist()
        known = length // 2
        lookup = PromptLookup(tokens[:known])
        for token in tokens[known:]:
            lookup.push(token)
        for most in (1, 5):
            assert lookup.draft(most) == looked_up_plainly(tokens, most), tokens


def test_an_acceptance_begins_with_its_guess_and_follows_what_happens() -> None:
    acceptance = Acceptance(0.5)
    assert acceptance.share == 0.5
    for _ in range(40):
        acceptance.note(4, 4)
    assert 0.85 < acceptance.share < 1
    for _ in range(40):
        acceptance.note(4, 0)
    assert acceptance.share < 0.25
    assert acceptance.drafted == 320
    for _ in range(60):
        acceptance.fade()
    assert acceptance.share == pytest.approx(0.5, abs=0.01)


def test_drafts_are_as_long_as_they_pay() -> None:
    free = draft_lengths([0.9, 0.2], [4, 4], 3, lambda rows: 1.0)
    assert free == [4, 4]
    dear = draft_lengths([0.9, 0.2], [4, 4], 3, float)
    assert dear == [0, 0]
    steps = draft_lengths([0.9, 0.2], [4, 4], 0, lambda rows: 1.0 if rows <= 4 else 9.0)
    assert steps == [2, 0]
    assert draft_lengths([], [], 5, lambda rows: 1.0) == []
    assert best_length(0.9, 4, 1, 0.5, lambda rows: 1.0) > 0
    assert best_length(0.3, 4, 1, 0.5, lambda rows: 1.0) == 0
