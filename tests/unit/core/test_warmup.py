"""A warm-up: a session runs dense until so many of its tokens have run, and all of them choose what
the others run on, as transformers does it with GRIFFIN as hooks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.errors import InvalidRequest
from griffin_core.forward.prompt import Prompt
from griffin_core.hf import sparsify
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.slim.masked import Masked
from griffin_core.slim.packed import Packed
from tests.unit.core.engines import at_baseline, complete, engine, finish, submit

IDS = torch.randint(0, 250, (190,), generator=torch.Generator().manual_seed(12))
MADE = 40

CASES = [
    ("topk", "none", 16, 30),
    ("topk", "none", 1, 3),
    ("topk", "bias", 30, 60),
    ("sensitive", "bias", 10, 20),
    ("topk", "residual", 150, 170),
    ("topk", "none", 30, 30),
    ("topk", "none", 30, 5),
]
"""Policy, correction, tokens of the prompt, and of prompt and warm-up together."""


def made(policy: Any, correction: Any, tokens: int, warmup: int, **options: Any) -> GenerateTask:
    return GenerateTask(
        prompt=tuple(IDS[:tokens].tolist()),
        pruning=PruningParams(
            density=0.5,
            policy=policy,
            correction=correction,
            correction_rank=48 if correction == "residual" else None,
            warmup_tokens=warmup,
        ),
        stopping=StoppingParams(max_tokens=MADE, ignore_eos=True),
        **options,
    )


def expected(directory: Path, model: Model, task: GenerateTask) -> list[int]:
    """What transformers makes: the warm-up dense, the rest on what prompt and warm-up choose."""
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    whole.generation_config.eos_token_id = None
    prompt, pruning = torch.tensor(task.prompt), task.pruning
    dense = whole.generate(prompt[None], do_sample=False, max_new_tokens=MADE)[0]
    chose = max(len(prompt), pruning.warmup_tokens or 0)
    options: dict[str, Any] = {
        "policy": pruning.policy,
        "correction": pruning.correction,
        "correction_rank": pruning.correction_rank,
    }
    own = dense[:chose]
    with sparsify(whole, own, density=0.5, calibration=model.decoder.calibration, **options):
        begun = dense[: chose + 1]
        left = len(prompt) + MADE - len(begun)
        tokens = whole.generate(begun[None], do_sample=False, max_new_tokens=left)[0]
    return tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("name", ["llama", "opt", "gemma"])
@pytest.mark.parametrize(
    "options",
    [
        {"slim": Packed()},
        {"slim": Masked(), "local_prefill_max_tokens": None},
        {"overlap": True},
        {"batch_invariant": True},
        {"sharing": "shared", "local_prefill_max_tokens": None},
    ],
    ids=["packed, handed over", "masked, read here", "overlap", "invariant", "shared"],
)
def test_an_engine_makes_what_transformers_makes(
    case: Any,
    name: str,
    options: dict[str, Any],
    tiny: Callable[[str], Model],
    tiny_directory: Callable[[str], Path],
) -> None:
    if "residual" in case and "local_prefill_max_tokens" not in options:
        pytest.skip("the prompt's inputs stay where it was read, so a bias is what can be fitted")
    if "residual" in case and "sharing" in options:
        pytest.skip("a group fits no residual when it chooses again")
    task = made(*case)
    with engine(tiny(name), **options) as running:
        tokens, finished = complete(running, task)
        assert tokens == expected(tiny_directory(name), tiny(name), task)
        figures = finished.pruning
        warm = max(len(task.prompt), case[3])
        assert figures.dense_tokens == 1 + warm - len(task.prompt)
        assert at_baseline(running)


def test_sessions_warm_up_beside_others_and_each_chooses_by_its_own(
    tiny: Callable[[str], Model], tiny_directory: Callable[[str], Path]
) -> None:
    tasks = [made("topk", "none", 3 + n, 20 + 3 * n, turn_id=f"turn {n}") for n in range(6)]
    with engine(tiny("llama"), overlap=True) as running:
        inboxes = [submit(running, task)[1] for task in tasks]
        for task, inbox in zip(tasks, inboxes, strict=True):
            tokens, _ = finish(inbox)
            assert tokens == expected(tiny_directory("llama"), tiny("llama"), task)
        assert at_baseline(running)


def test_a_turn_that_ends_while_it_warms_up_was_dense(tiny: Callable[[str], Model]) -> None:
    with engine(tiny("llama")) as running:
        task = made("topk", "none", 5, 200, keep=True)
        dense = GenerateTask(prompt=task.prompt, stopping=task.stopping)
        session_id, inbox = submit(running, task)
        tokens, finished = finish(inbox)
        assert tokens == complete(running, dense)[0]
        assert finished.pruning.mean_density == 1
        again = GenerateTask(
            prompt=(7, 8), continues=session_id, stopping=StoppingParams(max_tokens=3)
        )
        assert complete(running, again)[1].pruning.mean_density == 1  # 50 of the 200 tokens


def test_a_warm_up_goes_on_in_a_later_turn_until_so_many_tokens_choose(
    tiny: Callable[[str], Model],
) -> None:
    with engine(tiny("llama")) as running:
        task = made("topk", "none", 5, 48, keep=True)
        short = StoppingParams(max_tokens=20, ignore_eos=True)
        session_id, inbox = submit(running, replace(task, stopping=short))
        assert finish(inbox)[1].pruning.mean_density == 1
        long = StoppingParams(max_tokens=60, ignore_eos=True)
        later = GenerateTask(prompt=(7, 8), continues=session_id, stopping=long)
        _, finished = complete(running, later)
        # 5 tokens and 3 (the last one of the first turn, and the prompt) choose, then 40 more.
        assert finished.pruning.dense_tokens == 1 + 40
        assert at_baseline(running)


def test_what_a_pass_has_read_is_not_held(tiny: Callable[[str], Model]) -> None:
    def held() -> int:
        gc.collect()
        return sum(type(one) is Prompt for one in gc.get_objects())

    with engine(tiny("llama"), local_prefill_max_tokens=None) as running:
        before = held()  # other tests may hold some
        turn, inbox = submit(running, made("topk", "residual", 150, 160))
        for _ in range(30):
            inbox.get()
        assert held() <= before
        running.cancel(turn)
        assert at_baseline(running)


def test_a_session_that_goes_away_in_its_dense_pass_leaves_nothing(
    tiny: Callable[[str], Model],
) -> None:
    with engine(tiny("llama")) as running:
        for tokens in range(2, 12):
            turn, inbox = submit(running, made("topk", "none", 4, 4 + tokens))
            for _ in range(tokens):
                inbox.get()
            running.cancel(turn)
        assert at_baseline(running)


@pytest.mark.parametrize("given", [-1, 1 << 21, 2.5, "8"])
def test_a_warm_up_out_of_range_is_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"pruning\.warmup_tokens.*\[0, 1048576\]"):
        PruningParams(warmup_tokens=given)


def test_a_score_has_none() -> None:
    with pytest.raises(InvalidRequest, match="0 in a score"):
        ScoreTask(prompt=(1,), continuations=((2,),), pruning=PruningParams(warmup_tokens=8))
