"""Layers with different numbers of experts, and corrections for what is left out: what comes after
the choice takes both, and an engine makes what transformers makes with GRIFFIN as hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from griffin_core.engine.events import Finished
from griffin_core.engine.expert_group import ExpertGroup, Seat, summed
from griffin_core.engine.session import Session
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.selection import Selection
from griffin_core.forward.correction import corrected
from griffin_core.forward.prefill import launch
from griffin_core.forward.prompt import Part, Prompt
from griffin_core.hf import sparsify
from griffin_core.kv.budget import Budget
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.masked import Masked
from griffin_core.slim.packed import Packed
from griffin_core.slim.views import SlimViews
from griffin_core.spec.choices import CorrectionKind, PolicyName
from tests.unit.core.engines import at_baseline, complete, engine, finish, submit

IDS = torch.randint(0, 250, (190,), generator=torch.Generator().manual_seed(11))
MADE = 12
RANK = 48
"""That of the tiny models' hidden states: the best directions are then all there are, and two ways
of finding them agree."""

CASES: list[tuple[PolicyName, CorrectionKind, int]] = [
    ("sensitive", "none", 25),
    ("topk_budgets", "none", 25),
    ("sensitive", "bias", 25),
    ("topk", "bias", 60),
    ("topk", "residual", 150),
    ("sensitive", "residual", 150),
]
"""Policy, correction, and the number of prompt tokens."""


@pytest.fixture(params=["llama", "opt", "gemma"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def task(request: pytest.FixtureRequest) -> GenerateTask:
    return made(*request.param)


def made(
    policy: PolicyName, correction: CorrectionKind, tokens: int, **options: Any
) -> GenerateTask:
    residual = correction == "residual"
    return GenerateTask(
        prompt=tuple(IDS[:tokens].tolist()),
        pruning=PruningParams(
            density=0.5,
            policy=policy,
            correction=correction,
            correction_rank=RANK if residual else None,
        ),
        stopping=StoppingParams(max_tokens=MADE, ignore_eos=True),
        **options,
    )


@pytest.fixture
def expected(
    name: str,
    task: GenerateTask,
    tiny: Callable[[str], Model],
    tiny_directory: Callable[[str], Path],
) -> tuple[list[int], tuple[int, ...]]:
    """What transformers makes of the prompt with GRIFFIN as hooks, and K of each layer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_directory(name), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompt, pruning = torch.tensor(task.prompt), task.pruning
    options: dict[str, Any] = {
        "policy": pruning.policy,
        "correction": pruning.correction,
        "correction_rank": pruning.correction_rank,
    }
    calibration = tiny(name).decoder.calibration
    with sparsify(model, prompt, density=0.5, calibration=calibration, **options) as chosen:
        tokens = model.generate(prompt[None], do_sample=False, max_new_tokens=MADE)
    return tokens[0, len(prompt) :].tolist(), chosen.experts.counts


def check(
    finished: Finished, tokens: list[int], expected: tuple[list[int], tuple[int, ...]]
) -> None:
    figures = finished.pruning
    assert tokens == expected[0]
    assert figures.expert_counts == expected[1]
    assert figures.experts_per_layer == sum(expected[1]) // 3 == 44


@pytest.mark.parametrize("form", [Packed, Masked])
@pytest.mark.parametrize("local", [0, None], ids=["handed over", "read here"])
def test_an_engine_makes_what_transformers_makes(
    name: str,
    task: GenerateTask,
    expected: tuple[list[int], tuple[int, ...]],
    tiny: Callable[[str], Model],
    local: int | None,
    form: type,
) -> None:
    with engine(tiny(name), slim=form(), local_prefill_max_tokens=local) as running:
        for _ in range(2):
            tokens, finished = complete(running, task)
            check(finished, tokens, expected)
            kind = task.pruning.correction
            assert finished.pruning.correction == kind
            width = 48 * 4 * 3
            vectors = {"none": 0, "bias": 1, "residual": 1 + 2 * RANK}[kind or "none"]
            assert finished.pruning.correction_bytes == vectors * width
        assert at_baseline(running)


@pytest.mark.parametrize(
    "options",
    [{"sharing": "shared"}, {"batch_invariant": True}, {"slim": None, "costs": None}],
    ids=["shared", "invariant", "measured costs"],
)
def test_so_do_many_sessions_together(
    name: str,
    task: GenerateTask,
    expected: tuple[list[int], tuple[int, ...]],
    tiny: Callable[[str], Model],
    options: dict[str, Any],
) -> None:
    """Prompts of the same tokens, so that a group's set is that of each; a bias is then the same
    too, and a residual becomes one when the group chooses again."""
    pruning = task.pruning
    if "sharing" in options and (pruning.policy == "sensitive" or pruning.correction == "residual"):
        pytest.skip("a group weighs its prior less than each of its members, and fits no residual")
    with engine(tiny(name), **options) as running:
        turns = [replace(task, turn_id=f"turn {number}") for number in range(5)]
        inboxes = [submit(running, turn)[1] for turn in turns]
        for tokens, finished in map(finish, inboxes):
            check(finished, tokens, expected)
        assert at_baseline(running)


def test_a_kept_session_goes_on_with_experts_and_a_correction_of_its_own(
    tiny: Callable[[str], Model],
) -> None:
    with engine(tiny("llama")) as running:
        session_id, inbox = submit(running, made("sensitive", "residual", 150, keep=True))
        _, finished = finish(inbox)
        assert finished.kept and finished.pruning.correction == "residual"
        again = GenerateTask(
            prompt=tuple(IDS[150:170].tolist()),
            continues=session_id,
            stopping=StoppingParams(max_tokens=4, ignore_eos=True),
        )
        _, later = complete(running, again)
        # Twenty tokens are too few for a residual, and all tokens of both turns make the bias.
        assert later.pruning.correction == "bias"
        assert sum(later.pruning.expert_counts) == 3 * 44


@pytest.mark.parametrize(
    ("tokens", "kind", "given"),
    [
        (47, "bias", "none"),
        (48, "bias", "bias"),
        (47, "residual", "none"),
        (127, "residual", "bias"),
        (128, "residual", "residual"),
    ],
)
def test_a_prompt_that_is_too_short_gets_less(
    tokens: int, kind: CorrectionKind, given: str, tiny: Callable[[str], Model]
) -> None:
    with engine(tiny("llama")) as running:
        _, finished = complete(running, made("topk", kind, tokens))
        assert finished.pruning.correction == given


def test_a_dense_session_has_no_correction(tiny: Callable[[str], Model]) -> None:
    with engine(tiny("llama")) as running:
        task = GenerateTask(
            prompt=tuple(IDS[:150].tolist()),
            pruning=PruningParams(density=1.0, correction="residual"),
            stopping=StoppingParams(max_tokens=4),
        )
        _, finished = complete(running, task)
        assert finished.pruning.correction == "none" and finished.pruning.mean_density == 1


@pytest.mark.parametrize("mode", ["generation", "classification"])
@pytest.mark.parametrize("correction", ["none", "bias", "residual"])
def test_scores_run_on_them_too(
    mode: Any,
    correction: CorrectionKind,
    tiny: Callable[[str], Model],
    tiny_directory: Callable[[str], Path],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_directory("llama"), dtype=torch.float32)
    prompt, continuation = IDS[:150], IDS[160:166]
    pruning = made("sensitive", correction, 150).pruning
    score = ScoreTask(
        prompt=tuple(prompt.tolist()),
        continuations=(tuple(continuation.tolist()), (8, 9)),
        mode=mode,
        pruning=pruning,
    )
    with engine(tiny("llama")) as running:
        _, scored = complete(running, score)
        assert at_baseline(running)
    whole = torch.cat([prompt, continuation[:-1]])
    fitted = correction
    if mode == "classification" and correction == "residual":
        fitted = "bias"
    with (
        sparsify(
            model,
            prompt if mode == "generation" else whole[:-1],
            density=0.5,
            policy="sensitive",
            correction=fitted,
            correction_rank=RANK if fitted == "residual" else None,
            calibration=tiny("llama").decoder.calibration,
        ),
        torch.no_grad(),
    ):
        logprobs = model(whole[None]).logits[0].log_softmax(dim=1)[len(prompt) - 1 :]
    exact = logprobs.gather(1, continuation[:, None])[:, 0].tolist()
    assert list(scored.continuations[0].logprobs) == pytest.approx(exact, abs=2e-4)


@pytest.mark.parametrize("local", [0, None], ids=["handed over", "read here"])
def test_choices_of_any_length_are_classified_with_a_bias(
    local: int | None, tiny: Callable[[str], Model], tiny_directory: Callable[[str], Path]
) -> None:
    """Of one token, whose context was read elsewhere or here, as of several."""
    model = AutoModelForCausalLM.from_pretrained(tiny_directory("llama"), dtype=torch.float32)
    choices = ((5,), (6, 7), (9, 10, 11))
    score = ScoreTask(
        prompt=tuple(IDS[:150].tolist()),
        continuations=choices,
        mode="classification",
        pruning=made("topk", "residual", 150).pruning,
    )
    with engine(tiny("llama"), local_prefill_max_tokens=local) as running:
        _, scored = complete(running, score)
        assert scored.pruning.correction == "bias"
        assert at_baseline(running)
    calibration = tiny("llama").decoder.calibration
    for choice, got in zip(choices, scored.continuations, strict=True):
        ids = torch.cat([IDS[:150], torch.tensor(choice[:-1], dtype=torch.int64)])
        chosen = sparsify(model, ids[:-1], density=0.5, correction="bias", calibration=calibration)
        with chosen, torch.no_grad():
            exact = model(ids[None]).logits[0, -1].log_softmax(dim=0)[choice[-1]]
        assert got.logprobs[-1] == pytest.approx(float(exact), abs=2e-4)


def test_a_group_has_a_bias_of_all_its_prompts_and_not_what_the_first_one_brought(
    tiny: Callable[[str], Model],
) -> None:
    """With sets that do not depend on the prompt, so that the group's set never changes."""
    prompts = IDS[:180].view(3, 60)
    decoder = tiny("llama").decoder
    sessions = []
    for prompt in prompts:
        selection = Selection(
            density=0.5, policy="magnitude", correction=CorrectionParams(kind="residual", rank=4)
        )
        (read,) = launch(
            decoder, [Part(prompt=Prompt(decoder, prompt.tolist(), selection), tokens=60)]
        ).end()
        session = Session("")
        session.selection, session.statistics = selection, read.statistics
        session.slim = read.corrected().slim
        sessions.append(session)
    group = ExpertGroup()
    views = SlimViews(decoder, BlockTable(decoder), Packed(), Budget(1 << 30))
    for number, session in enumerate(sessions):
        session.turn = cast("Any", SimpleNamespace(layout="gemv", chooses=False))
        session.sharing = "shared"
        group.members.append(Seat(session, 0, prunes=True))
        group.stale = True
        group.advance(decoder, views, 100 * number)
    assert group.slim is not None and group.slim.correction is not None
    assert group.slim.correction.rank == 0
    exact = corrected(
        decoder,
        replace(group.slim, correction=None),
        summed(sessions),
        sessions[0].selection,
    )
    assert exact.correction is not None
    torch.testing.assert_close(group.slim.correction.bias, exact.correction.bias)
    views.build(60.0)
    assert group.view is not None and group.view.ready and not group.view.pending
