"""Scores in both of the paper's modes: what they are, that they are so in whatever company, and
that they leave nothing behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from griffin_core import sparsify
from griffin_core.engine import look_up
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Failed, Finished, Scored, TokensMade
from griffin_core.engine.limits import Limits
from griffin_core.engine.scoring import choice_bytes
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.errors import CapacityExhausted, EngineFault, InvalidRequest, NonFiniteLogits
from griffin_core.experts.policies import POLICIES, PolicyName
from griffin_core.forward.decode import EagerStep
from griffin_core.forward.prompt_pass import Pass
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.choices import ScoreMode
from tests.calibrations import made_up
from tests.servers import eventually
from tests.tiny import VOCABULARY
from tests.unit.core.engines import Busy, at_baseline, complete, engine, finish, submit

MODES: tuple[ScoreMode, ...] = ("generation", "classification")

IDS = torch.randint(0, VOCABULARY - 5, (200,), generator=torch.Generator().manual_seed(16)).tolist()
CONTEXT = tuple(IDS[:17])
CONTINUATIONS = (
    tuple(IDS[20:21]),
    tuple(IDS[30:32]),
    tuple(IDS[40:63]),
    tuple(IDS[70:71]),
    tuple(IDS[40:46]),
)


@pytest.fixture
def running(model: Model) -> Iterator[Engine]:
    with engine(model, prefill_source=None) as made:
        yield made
        eventually(lambda: at_baseline(made))


@pytest.fixture(scope="module")
def exact(tiny_directory: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """Name of ``tests.tiny.MODELS`` -> the model of transformers in float64."""
    made: dict[str, PreTrainedModel] = {}

    def load(name: str) -> PreTrainedModel:
        if name not in made:
            directory = tiny_directory(name)
            made[name] = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        return made[name]

    return load


@torch.no_grad()
def reference(
    model: PreTrainedModel, task: ScoreTask, continuation: Sequence[int], density: float
) -> list[float]:
    """By ``sparsify``: the mode is which tokens are its prompt."""
    ids = torch.tensor([*task.prompt, *continuation[:-1]])
    chooses = ids[: len(task.prompt)] if task.mode == "generation" else ids[:-1]
    policy: Any = task.pruning.policy
    options: dict[str, Any] = {"density": density, "policy": policy, "seed": task.seed}
    with sparsify(model, chooses, calibration=made_up(3, 88), **options):
        logits = model(ids[None]).logits[0]
    logprobs = logits.log_softmax(dim=1)[len(task.prompt) - 1 :]
    return [float(row[token]) for row, token in zip(logprobs, continuation, strict=True)]


def task(
    density: float = 0.5,
    *,
    mode: ScoreMode = "classification",
    policy: PolicyName = "topk",
    prompt: tuple[int, ...] = CONTEXT,
    continuations: tuple[tuple[int, ...], ...] = CONTINUATIONS,
    **options: Any,
) -> ScoreTask:
    pruning = PruningParams(density=density, policy=policy)
    return ScoreTask(
        prompt=prompt,
        continuations=continuations,
        mode=mode,
        pruning=pruning,
        seed=11,
        **options,
    )


def logprobs(scored: Scored) -> list[tuple[float, ...]]:
    assert isinstance(scored, Scored), scored
    return [one.logprobs for one in scored.continuations]


def close(ours: list[tuple[float, ...]], theirs: Any, tolerance: float = 1e-5) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(list(other), abs=tolerance)


# -- what a score is ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma", "opt"])
def test_scores_are_those_of_sparsify_in_float64(
    name: str,
    mode: ScoreMode,
    tiny: Callable[[str], Model],
    exact: Callable[[str], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By every policy; scored together, and cut into pieces by small steps and passes."""
    monkeypatch.setattr(look_up, "STEP_TOKENS", 29)
    settings = [(density, policy) for density in (0.25, 0.5) for policy in POLICIES]
    tasks = [task(density, mode=mode, policy=policy) for density, policy in settings]
    tasks.append(task(1.0, mode=mode))
    with engine(tiny(name), prefill_source=None, limits=Limits(chunk_tokens=40)) as running:
        inboxes = [submit(running, each)[1] for each in tasks]
        results = [finish(inbox)[1] for inbox in inboxes]
    for each, scored in zip(tasks, results, strict=True):
        density = each.pruning.density or 1.0
        expected = [reference(exact(name), each, c, density) for c in CONTINUATIONS]
        close(logprobs(scored), expected, tolerance=1e-4)
        for one in scored.continuations:
            assert len(one.greedy) == len(one.logprobs)


@pytest.mark.parametrize("mode", MODES)
def test_each_continuation_is_scored_as_if_it_were_alone(mode: ScoreMode, running: Engine) -> None:
    together = logprobs(complete(running, task(mode=mode))[1])
    alone = [task(mode=mode, continuations=(one,)) for one in CONTINUATIONS]
    close(together, [logprobs(complete(running, each)[1])[0] for each in alone])


def test_the_last_log_probability_alone_is_of_the_pruned_model(running: Engine) -> None:
    pruned, dense = (logprobs(complete(running, task(density))[1]) for density in (0.25, 1.0))
    for one, other in zip(pruned, dense, strict=True):
        assert one[:-1] == pytest.approx(other[:-1], abs=1e-5)
        assert abs(one[-1] - other[-1]) > 1e-3


def test_a_token_is_greedy_if_none_is_more_likely(
    running: Engine, exact: Callable[[str], PreTrainedModel]
) -> None:
    with torch.no_grad():
        best = int(exact("llama")(torch.tensor([CONTEXT])).logits[0, -1].argmax())
    for mode in MODES:
        each = task(1.0, mode=mode, continuations=((best,), (best + 1,)))
        scored = complete(running, each)[1]
        assert [one.greedy for one in scored.continuations] == [(True,), (False,)]


@pytest.mark.parametrize("mode", MODES)
def test_figures_say_what_the_tokens_ran_on(mode: ScoreMode, running: Engine) -> None:
    scored = complete(running, task(0.5, mode=mode))[1]
    tokens = sum(len(one) for one in CONTINUATIONS)
    pruned = tokens - len(CONTINUATIONS) if mode == "generation" else len(CONTINUATIONS)
    figures = scored.pruning
    assert figures.dense_tokens == tokens - pruned
    assert figures.mean_density == pytest.approx((tokens - pruned / 2) / tokens)
    assert all(0.5 < mass < 1 for mass in figures.norm_mass) and len(figures.norm_mass) == 3


def test_the_figures_of_a_classification_are_of_the_last_continuations_experts(
    running: Engine, exact: Callable[[str], PreTrainedModel]
) -> None:
    scored = complete(running, task(0.5))[1]
    ids = torch.tensor([*CONTEXT, *CONTINUATIONS[-1]])
    with sparsify(exact("llama"), ids[:-2], density=0.5) as chosen:
        pass
    assert scored.pruning.norm_mass == pytest.approx(chosen.norm_mass[0], abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_context_that_another_server_reads_gives_the_same(mode: ScoreMode, model: Model) -> None:
    with engine(model, prefill_source=None) as running:
        own = logprobs(complete(running, task(mode=mode))[1])
    with engine(model, local_prefill_max_tokens=0) as running:
        handed = logprobs(complete(running, task(mode=mode))[1])
        eventually(lambda: at_baseline(running))
    assert handed == own


def test_classification_needs_no_view_and_shares_no_set(model: Model) -> None:
    with engine(model, prefill_source=None, sharing="shared") as running:
        inboxes = [submit(running, task(prompt=tuple(IDS[n : n + 9])))[1] for n in range(8)]
        shared = [logprobs(finish(inbox)[1]) for inbox in inboxes]
        assert running.snapshot().result(10).views == ()
    with engine(model, prefill_source=None) as running:
        for n, together in enumerate(shared):
            each = task(prompt=tuple(IDS[n : n + 9]))
            close(together, logprobs(complete(running, each)[1]))


# -- in company -----------------------------------------------------------------------------------


def many(number: int) -> ScoreTask:
    """Tasks of both modes, of all lengths and settings."""
    begin, sizes = 3 * number, ((1,), (5, 1), (2, 40, 3), (30, 30))[number % 4]
    return task(
        (0.5, 0.25, 1.0)[number % 3],
        mode=MODES[number % 2],
        policy=POLICIES[number % 5],
        prompt=tuple(IDS[begin : begin + 2 + number % 7]),
        continuations=tuple(
            tuple(IDS[begin + n : begin + n + size]) for n, size in enumerate(sizes)
        ),
    )


def test_batched_equals_alone(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [logprobs(complete(running, many(number))[1]) for number in range(24)]
    rows: list[int] = []
    whole = look_up.look_up

    def noted(*arguments: Any) -> Any:
        *_, pieces = arguments
        rows.append(len(pieces))
        return whole(*arguments)

    monkeypatch.setattr("griffin_core.engine.look_up.look_up", noted)
    stream = GenerateTask(prompt=(1, 2), stopping=StoppingParams(max_tokens=40, ignore_eos=True))
    tokens = complete(running, stream)[0]
    beside = submit(running, replace(stream, turn_id=uuid4().hex))[1]
    inboxes = [submit(running, many(number))[1] for number in range(24)]
    for inbox, expected in zip(inboxes, alone, strict=True):
        close(logprobs(finish(inbox)[1]), expected)
    assert finish(beside)[0] == tokens
    assert max(rows) >= 4  # and not one by one


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_scores_run_in_the_batch_of_the_sessions_that_generate(
    mode: ScoreMode, fails: bool, running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where that fails, each kind runs without the other."""
    scored = [replace(many(number), mode=mode) for number in range(6)]
    expected = [logprobs(complete(running, replace(each))[1]) for each in scored]
    stream = GenerateTask(prompt=(1, 2), stopping=StoppingParams(max_tokens=40, ignore_eos=True))
    tokens = complete(running, stream)[0]
    whole, joined, drawn = EagerStep.launch, 0, []

    def noted(self: EagerStep, sequences: Any, *rest: Any) -> Any:
        nonlocal joined
        if len({each.slot is None for each in sequences}) == 2:
            joined += 1
            if fails:
                raise MemoryError("no memory for both")
        draws = whole(self, sequences, *rest)
        drawn.append((sum(each.slot is not None for each in sequences), len(draws.wait())))
        return draws

    monkeypatch.setattr(EagerStep, "launch", noted)
    busy = Busy(running)  # so that they run together
    beside = [submit(running, replace(stream, turn_id=uuid4().hex))[1] for _ in range(2)]
    inboxes = [submit(running, replace(each, turn_id=uuid4().hex))[1] for each in scored]
    busy.release()
    for inbox, each in zip(inboxes, expected, strict=True):
        close(logprobs(finish(inbox)[1]), each)
    assert [finish(inbox)[0] for inbox in beside] == [tokens, tokens]
    assert joined > 0
    assert all(asked == got for asked, got in drawn)  # a token for each session that draws
    eventually(lambda: at_baseline(running))


def test_a_score_that_does_not_fit_beside_others_runs_by_itself_as_a_whole(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EagerStep, "most_rows", 8)
    whole, rows = EagerStep.launch, []

    def noted(self: EagerStep, sequences: Any, *rest: Any) -> Any:
        scores = [len(each.token_ids) for each in sequences if each.slot is None]
        rows.extend(scores)
        assert len(scores) in (0, len(sequences))
        return whole(self, sequences, *rest)

    monkeypatch.setattr(EagerStep, "launch", noted)
    stream = GenerateTask(prompt=(1, 2), stopping=StoppingParams(max_tokens=90, ignore_eos=True))
    long = task(mode="generation", continuations=(tuple(IDS[:100]),))
    busy = Busy(running)
    inboxes = [submit(running, replace(stream, turn_id=uuid4().hex))[1] for _ in range(3)]
    scored = submit(running, long)[1]
    busy.release()
    assert isinstance(finish(scored)[1], Scored)
    for inbox in inboxes:
        finish(inbox)
    assert rows == [99]  # the first of the 100 tokens is scored by the context


def test_a_step_holds_a_bounded_number_of_logits(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look_up, "STEP_TOKENS", 16)
    rows: list[int] = []
    whole = Decoder.head

    def head(self: Decoder, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(hidden))
        return whole(self, hidden, *rest)

    monkeypatch.setattr(Decoder, "head", head)
    inboxes = [submit(running, many(number))[1] for number in range(24)]
    assert all(isinstance(finish(inbox)[1], Scored) for inbox in inboxes)
    assert max(rows) == 16


def test_a_running_score_does_not_hold_up_a_stream(model: Model) -> None:
    """Every step has a token for the stream, and one step's tokens for the scores."""
    with engine(model, prefill_source=None) as running:
        long = task(continuations=(tuple(IDS[:180]),) * 60)
        _, inbox = submit(running, long)
        stream = GenerateTask(prompt=(1,), stopping=StoppingParams(max_tokens=20, ignore_eos=True))
        tokens, end = complete(running, stream)
        assert isinstance(end, Finished) and len(tokens) == 20
        running.sessions().result(10)
        assert inbox.events.qsize() <= 2, "the score should not be over yet"
        running.cancel(long.turn_id)
        eventually(lambda: at_baseline(running))


def test_batch_invariant_scores_are_the_same_to_the_bit_in_company(model: Model) -> None:
    with engine(model, prefill_source=None, batch_invariant=True) as running:
        alone = [logprobs(complete(running, many(number))[1]) for number in range(12)]
        inboxes = [submit(running, many(number))[1] for number in range(12)]
        assert [logprobs(finish(inbox)[1]) for inbox in inboxes] == alone


# -- what goes wrong ------------------------------------------------------------------------------


class Spoilt:
    """Makes a function fail, or its result not finite, for the tokens of one session."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
        self.marked, self.runs = 250, 0
        embed, layer = Decoder.embed, Decoder.layer
        rows: list[torch.Tensor] = []

        def embed_(decoder: Decoder, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            rows[:] = [ids == self.marked]
            return embed(decoder, ids, positions)

        def layer_(decoder: Decoder, index: int, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            out = layer(decoder, index, x, *rest)
            if index == 2 and rows[0].any():
                self.runs += 1
                if error is not None:
                    raise error
                out[rows[0]] = math.nan
            return out

        monkeypatch.setattr(Decoder, "embed", embed_)
        monkeypatch.setattr(Decoder, "layer", layer_)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [None, MemoryError("no memory for this one")])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_one_that_fails_ends_alone(
    place: int,
    error: Exception | None,
    mode: ScoreMode,
    running: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever in its tail it is. (The last token is not run.)"""
    others = [many(number) for number in range(8)]
    expected = [logprobs(complete(running, each)[1]) for each in others]
    bad = [5, 6, 7, 8, 9, 10]
    bad[place] = 250
    spoilt = Spoilt(monkeypatch, error)
    failing = task(0.5, mode=mode, continuations=((1, 2), tuple(bad)))
    tasks = [replace(each, turn_id=uuid4().hex) for each in others]
    tasks.insert(4, failing)
    inboxes = [submit(running, each)[1] for each in tasks]
    ends = [finish(inbox)[1] for inbox in inboxes]
    failed = ends.pop(4)
    assert isinstance(failed, Failed) and spoilt.runs
    if error is None:
        assert isinstance(failed.error, NonFiniteLogits)
        assert failed.error.position == len(CONTEXT) + place + 1
    else:
        assert isinstance(failed.error, EngineFault) and "no memory" in str(failed.error)
    for end, each in zip(ends, expected, strict=True):
        close(logprobs(end), each)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("owner", "name"), [(look_up, "chances_of"), (Pass, "end"), (Decoder, "head")]
)
def test_a_step_that_fails_once_is_run_again_from_where_it_was(
    owner: Any, name: str, mode: ScoreMode, running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [task(mode=mode, prompt=tuple(IDS[n : n + 9])) for n in range(4)]
    expected = [logprobs(complete(running, each)[1]) for each in tasks]
    whole, calls, together = getattr(owner, name), 0, 0
    run = look_up.look_up

    def noted(*arguments: Any) -> Any:
        *_, pieces = arguments
        nonlocal together
        together = len(pieces)
        return run(*arguments)

    def sometimes(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        shared = len(arguments[0].parts) if name == "end" else together
        calls += shared > 1
        if shared > 1 and calls in (2, 3):
            raise MemoryError("no memory, this once")
        return whole(*arguments, **named)

    monkeypatch.setattr("griffin_core.engine.look_up.look_up", noted)
    monkeypatch.setattr(owner, name, sometimes)
    busy = Busy(running)  # so that they run together
    inboxes = [submit(running, replace(each, turn_id=uuid4().hex))[1] for each in tasks]
    busy.release()
    for inbox, each in zip(inboxes, expected, strict=True):
        close(logprobs(finish(inbox)[1]), each)
    assert calls >= (1 if (name, mode) == ("end", "generation") else 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_score_that_is_cancelled_midway_leaves_nothing(
    mode: ScoreMode, running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also amid its tail, between two steps."""
    monkeypatch.setattr(look_up, "STEP_TOKENS", 3)
    whole, seen = look_up.look_up, []

    def noted(*arguments: Any) -> Any:
        *_, pieces = arguments
        seen.append(pieces)
        return whole(*arguments)

    monkeypatch.setattr("griffin_core.engine.look_up.look_up", noted)
    for steps in (1, 2, 9):
        seen.clear()
        each = task(mode=mode, continuations=(tuple(IDS[:100]),) * 50)
        submit(running, each)
        eventually(lambda n=steps: len(seen) >= n)
        running.cancel(each.turn_id)
        eventually(lambda: at_baseline(running))


def test_what_a_classification_holds_is_what_it_reserves(model: Model) -> None:
    """``Budget.take`` raises if it held more."""
    each = task(continuations=CONTINUATIONS)
    spec = model.decoder.spec
    size = kv_bytes(spec, torch.float32, each.run_tokens) + choice_bytes(model.decoder)
    with engine(model, prefill_source=None, limits=Limits(session_bytes=size)) as running:
        inboxes = [submit(running, replace(each, turn_id=uuid4().hex))[1] for _ in range(4)]
        assert all(isinstance(finish(inbox)[1], Scored) for inbox in inboxes)
        assert running.peak_bytes == size
        eventually(lambda: at_baseline(running) and running.held_bytes == 0)
    with engine(model, prefill_source=None, limits=Limits(session_bytes=size - 1)) as running:
        refused = submit(running, each)[1].until(Scored)
        assert isinstance(refused, Failed) and isinstance(refused.error, CapacityExhausted)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": (1,)}, "context: got one token; allowed: at least two tokens with mode clas"),
        ({"prompt": ()}, "context: got no tokens"),
        ({"continuations": ()}, "continuations: got 0 of them; allowed: 1 to 256"),
        ({"continuations": ((1,),) * 257}, "continuations: got 257 of them; allowed: 1 to 256"),
        ({"continuations": ((1,), ())}, "b: got no tokens after the context"),
        ({"continuations": ((1,), (2, 260))}, r"b\[1\]: got 260; allowed: \[0, 260\)"),
        ({"continuations": ((1,), (2,) * 241)}, "b: got 258 tokens with the context; allowed: at"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    options: dict[str, Any], words: str, model: Model
) -> None:
    each = task(**options)
    with pytest.raises(InvalidRequest, match=f"^{words}"):
        each.check(model.decoder.spec, "context", "abcdefg"[: len(each.continuations)])


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^mode: got paper; allowed: generation, classific"):
        task(mode="paper")  # type: ignore[arg-type]


def test_a_full_context_can_be_scored(running: Engine) -> None:
    for mode in MODES:
        whole = task(mode=mode, prompt=tuple(IDS[:2]), continuations=((7,) * 254,))
        whole.check(running.model.decoder.spec, "context", ["continuation"])
        assert len(logprobs(complete(running, whole)[1])[0]) == 254


def test_events_before_the_score_are_those_of_any_task(running: Engine) -> None:
    _, inbox = submit(running, task())
    kinds = []
    while not isinstance(event := inbox.get(), Scored):
        kinds.append(type(event).__name__)
        assert not isinstance(event, TokensMade)
    assert kinds == ["Admitted", "Started"]
