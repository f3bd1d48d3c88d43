"""A loop that launches a step before it has read the last one makes what one without does, and the
step too many shows nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from transformers import AutoModelForCausalLM

from griffin_core.engine.events import Finished, Scored, TokensMade
from griffin_core.engine.limits import Limits
from griffin_core.engine.ports import Observer
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.errors import NonFiniteLogits
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.forward.decode import EagerStep
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.model.load import Model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler
from griffin_core.sampling.stopping import FinishReason, StoppingParams
from griffin_core.slim.masked import Masked
from griffin_core.slim.packed import Packed
from tests.servers import eventually
from tests.tiny import FAMILIES
from tests.unit.core.engines import Inbox, at_baseline, complete, engine, finish, submit


class Counting(Observer):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.chosen = 0

    def stepped(self, seconds: float, sessions: int) -> None:
        self.steps.append(sessions)

    def chose(self, experts: SlimSpec) -> None:
        self.chosen += 1


def all_of(inbox: Inbox) -> tuple[list[Any], Any]:
    """Everything that was shown of the tokens, and the last event."""
    shown: list[Any] = []
    while True:
        event = inbox.until(TokensMade, Finished, Scored)
        if not isinstance(event, TokensMade):
            return shown, event
        shown += zip(event.ids, event.logprobs, strict=True)


def stopping_task(stop_token: int | None = None, **more: Any) -> GenerateTask:
    """Ends by an unpredictable token, if one is given."""
    ends = frozenset() if stop_token is None else frozenset({stop_token})
    return GenerateTask(
        **{
            "prompt": tuple(range(9)),
            "sampling": SamplingParams(temperature=1.0, top_p=0.95, seed=5, presence_penalty=0.3),
            "stopping": StoppingParams(max_tokens=40, ignore_eos=True, stop_token_ids=ends),
            "pruning": PruningParams(density=0.5),
            "top_logprobs": 2,
            **more,
        }
    )


def turns(model: Model, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A conversation of three turns, each ended by a token in the middle, with what a session and
    an observer show of it."""
    observer = Counting()
    found: list[Any] = []
    caches: list[KvCache] = []  # of the whole completion, and of the session
    allocate = KvPool.allocate

    def noted(pool: KvPool, capacity: int) -> KvCache:
        caches.append(allocate(pool, capacity))
        return caches[-1]

    monkeypatch.setattr(KvPool, "allocate", noted)
    with engine(model, prefill_source=None, overlap=overlap, observer=observer) as running:
        whole = complete(running, stopping_task())[0]
        session_id = None
        for turn in range(3):
            task = stopping_task(whole[20 + turn], keep=True, continues=session_id)
            shown, last = all_of(submit(running, task)[1])
            session_id = session_id or task.turn_id
            assert last.reason in (FinishReason.EOS, FinishReason.MAX_TOKENS)
            info = running.session(session_id).result(10)
            kept = running.snapshot(contents=True).result(10).session(session_id)
            assert kept is not None and kept.cache is not None and kept.statistic is not None
            found.append(
                (
                    shown,
                    (last.reason, last.prompt_tokens, last.generated_tokens, last.context_tokens),
                    (info.context_tokens, info.generated_tokens, info.pruning.kv_cache_bytes),
                    (kept.cache.tokens, kept.cache.capacity, kept.tokens, kept.in_flight),
                    kept.statistic.tolist(),
                    caches[1].slice(1, 0, kept.cache.tokens).tolist(),
                )
            )
        found.append((observer.steps, observer.chosen))
    monkeypatch.undo()
    assert len(caches) == 2
    return found


def test_a_step_too_many_shows_nowhere(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ahead = (turns(model, overlap, monkeypatch) for overlap in (False, True))
    assert plain[0][0] == ahead[0][0]
    assert 5 < len(plain[0][0]) < 40  # it was ended by the token
    assert plain == ahead


def test_no_ban_comes_late(model: Model) -> None:
    """Neither one that depends on the token before, nor one that depends on how many there are."""
    few = frozenset(range(97, 103))
    words = ((98,), (97, 97), (97, 99), (99, 100, 97), (100, 100), (101, 102, 101, 102))
    banned = SamplingParams(
        temperature=1.0, seed=7, allowed_token_ids=few | {257}, bad_words_ids=words
    )
    usual = SamplingParams(temperature=1.0, seed=8)
    eager = SamplingParams(logit_bias={257: 100.0})
    tasks = [
        stopping_task(sampling=banned, stopping=StoppingParams(max_tokens=60, min_tokens=50)),
        stopping_task(sampling=usual),
        stopping_task(sampling=eager, stopping=StoppingParams(max_tokens=60, min_tokens=23)),
    ]
    made = {}
    for overlap in (False, True):
        with engine(model, prefill_source=None, overlap=overlap) as running:
            alone = [complete(running, replace(task, turn_id=uuid4().hex))[0] for task in tasks]
            inboxes = [submit(running, task)[1] for task in tasks]
            made[overlap] = [finish(inbox)[0] for inbox in inboxes]
            assert made[overlap] == alone
            assert at_baseline(running)
    assert made[True] == made[False]
    bad, free, least = made[True]
    assert len(bad) >= 50 and 257 not in bad[:50] and set(bad) <= few | {257}
    for word in words:
        assert not any(tuple(bad[at : at + len(word)]) == word for at in range(len(bad)))
    assert len(free) == 40
    assert (len(least), least.index(257)) == (24, 23)


def test_steps_are_launched_ahead(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the suites above would compare a loop with itself."""
    launches: list[Any] = []
    launch = EagerStep.launch

    def noted(step: EagerStep, sequences: Any, top_logprobs: Any) -> Any:
        launches.append(sequences)
        return launch(step, sequences, top_logprobs)

    monkeypatch.setattr(EagerStep, "launch", noted)
    steps = {}
    for overlap in (False, True):
        with engine(model, prefill_source=None, overlap=overlap) as running:
            whole = complete(running, stopping_task())[0]
            launches.clear()
            complete(running, stopping_task(whole[-10]))
            steps[overlap] = len(launches)
    assert steps[True] == steps[False] + 1


@pytest.mark.parametrize("overlap", [False, True])
def test_the_last_token_that_a_request_may_have_is_foreseen(model: Model, overlap: bool) -> None:
    observer = Counting()
    with engine(model, prefill_source=None, overlap=overlap, observer=observer) as running:
        tokens, last = complete(running, stopping_task())
        assert len(tokens) == 40 and last.reason is FinishReason.MAX_TOKENS
    assert observer.steps == [1] * 39  # the first token is the prompt's


def test_steps_are_counted_alike_while_prompts_come(model: Model) -> None:
    """A step that is read because a prompt comes next counts as any other."""
    counted = {}
    for overlap in (False, True):
        observer = Counting()
        with engine(model, prefill_source=None, overlap=overlap, observer=observer) as running:
            inboxes = []
            for number in range(6):
                task = stopping_task(prompt=(number,) * 9)
                inboxes.append(submit(running, task)[1])
                inboxes[-1].until(TokensMade)
            for inbox in inboxes:
                finish(inbox)
        counted[overlap] = sum(observer.steps)
    assert counted[False] == counted[True] == 6 * 39


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_their_session_alone(
    overlap: bool, value: float, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(model, prefill_source=None, overlap=overlap) as running:
        well = complete(running, stopping_task())[0]
        sample = Sampler.sample
        sick = stopping_task(prompt=(7,) * 30)

        def broken(self: Any, logits: torch.Tensor, slots: Any, positions: Any) -> torch.Tensor:
            logits[positions == 40, 11] = value  # which only the longer prompt comes to
            return sample(self, logits, slots, positions)

        first = complete(running, stopping_task(prompt=(7,) * 30))[0]
        monkeypatch.setattr(Sampler, "sample", broken)
        healthy = submit(running, stopping_task(stopping=StoppingParams(max_tokens=30)))[1]
        failed = submit(running, sick)[1]
        made: list[int] = []
        while isinstance(event := failed.until(TokensMade, Finished), TokensMade):
            made += event.ids
        assert isinstance(event.error, NonFiniteLogits)
        assert "40" in str(event.error)
        assert made == first[:10]
        assert finish(healthy)[0] == well[:30]
        eventually(lambda: at_baseline(running))


@pytest.mark.parametrize("overlap", [False, True])
def test_slots_go_round(model: Model, overlap: bool) -> None:
    """More requests than slots, ended in all ways, leave every slot free."""
    limits = Limits(max_sessions=3)
    with engine(model, prefill_source=None, overlap=overlap, limits=limits) as running:
        alone = complete(running, stopping_task())[0]
        inboxes = [submit(running, stopping_task()) for _ in range(12)]
        for turn_id, _ in inboxes[::4]:
            running.cancel(turn_id)
        score = submit(running, ScoreTask(prompt=(1, 2), continuations=((3, 4, 5),)))[1]
        for number, (_, inbox) in enumerate(inboxes):
            if number % 4:
                assert finish(inbox)[0] == alone
        finish(score)
        eventually(lambda: at_baseline(running))
        assert sorted(running.snapshot().result(10).free_slots) == [0, 1, 2]


# -- the parity suites, with and without ---------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_generates_what_transformers_does(
    name: str, overlap: bool, tiny: Callable[[str], Model], tiny_directory: Callable[[str], Path]
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_directory(name), dtype=torch.float32)
    prompt = list(range(50, 71))
    ids = torch.tensor([prompt])
    expected = (
        reference.eval()
        .generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=0,
        )[0, len(prompt) :]
        .tolist()
    )
    task = GenerateTask(
        prompt=tuple(prompt), stopping=StoppingParams(max_tokens=16, ignore_eos=True)
    )
    with engine(tiny(name), prefill_source=None, overlap=overlap) as running:
        made = complete(running, task)[0]
    assert made[: len(expected)] == expected  # which ends with an end-of-sequence token
    assert len(expected) > 3


@pytest.mark.parametrize("overlap", [False, True])
def test_packed_masked_and_zeroed_generate_the_same(model: Model, overlap: bool) -> None:
    forms = {"packed": Packed(), "masked": Masked()}
    made = {}
    for name, form in forms.items():
        with engine(model, prefill_source=None, overlap=overlap, slim=form) as running:
            inboxes = [submit(running, stopping_task())[1] for _ in range(3)]  # zeroed, if packed
            made[name] = [finish(inbox)[0] for inbox in inboxes]
            made[name + " alone"] = [complete(running, stopping_task())[0]] * 3
    assert len(set(map(str, made.values()))) == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_prefill_elsewhere_and_here_give_the_same(model: Model, overlap: bool) -> None:
    made = []
    for own in (None, 0):
        with engine(model, local_prefill_max_tokens=own, overlap=overlap) as running:
            made.append(all_of(submit(running, stopping_task())[1])[0])
    assert made[0] == made[1]
