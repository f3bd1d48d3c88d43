"""Layers with different numbers of experts: what comes after the choice takes counts by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.experts import densities
from griffin_core.hf import sparsify
from griffin_core.model.load import Model
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.slim.masked import Masked
from griffin_core.slim.packed import Packed
from griffin_core.spec.choices import Sharing
from tests.unit.core.engines import at_baseline, complete, engine, finish, submit

COUNTS = (9, 88, 40)
PROMPT = torch.randint(0, 250, (25,), generator=torch.Generator().manual_seed(11))
MADE = 12


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the counts of all layers those of the test, at every density below 1."""
    uniform = densities.expert_counts

    def ours(density: float, *shape: Any) -> tuple[int, ...]:
        return COUNTS if density < 1 else uniform(density, *shape)

    monkeypatch.setattr(densities, "expert_counts", ours)


@pytest.fixture(params=["llama", "opt"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def expected(name: str, tiny_directory: Callable[[str], Path]) -> list[int]:
    """What transformers makes of the prompt with GRIFFIN as hooks."""
    model = AutoModelForCausalLM.from_pretrained(tiny_directory(name), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    with sparsify(model, PROMPT, density=0.5) as chosen:
        assert chosen.experts.counts == COUNTS
        made = model.generate(PROMPT[None], do_sample=False, max_new_tokens=MADE)
    return made[0, len(PROMPT) :].tolist()


def task(**options: Any) -> GenerateTask:
    return GenerateTask(
        prompt=tuple(PROMPT.tolist()),
        pruning=PruningParams(density=0.5),
        stopping=StoppingParams(max_tokens=MADE, ignore_eos=True),
        **options,
    )


@pytest.mark.parametrize("form", [Packed, Masked])
@pytest.mark.parametrize("local", [0, None], ids=["handed over", "read here"])
@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_an_engine_makes_what_transformers_makes(
    name: str,
    expected: list[int],
    tiny: Callable[[str], Model],
    sharing: Sharing,
    local: int | None,
    form: type,
) -> None:
    options: dict[str, Any] = {"sharing": sharing, "local_prefill_max_tokens": local}
    with engine(tiny(name), slim=form(), **options) as running:
        inboxes = [submit(running, task())[1] for _ in range(3)]
        for tokens, finished in map(finish, inboxes):
            assert tokens == expected
            figures = finished.pruning
            assert figures.expert_counts == COUNTS
            assert figures.experts_per_layer == sum(COUNTS) // 3
            assert figures.norm_mass[1] == 1 and max(figures.norm_mass[::2]) < 1
        assert at_baseline(running)


def test_a_kept_session_goes_on_with_experts_of_its_own(
    name: str, tiny: Callable[[str], Model]
) -> None:
    with engine(tiny(name)) as running:
        inbox = submit(running, task(keep=True))
        _, finished = finish(inbox[1])
        assert finished.kept
        _, again = complete(running, task(continues=inbox[0]))
        assert again.pruning.expert_counts == COUNTS


@pytest.mark.parametrize("mode", ["generation", "classification"])
def test_scores_run_on_them_too(mode: Any, tiny: Callable[[str], Model]) -> None:
    with engine(tiny("llama")) as running:
        _, scored = complete(
            running,
            ScoreTask(
                prompt=tuple(PROMPT.tolist()),
                continuations=((5, 6, 7), (8, 9)),
                mode=mode,
                pruning=PruningParams(density=0.5),
            ),
        )
        assert scored.pruning.expert_counts == COUNTS
        assert [len(each.logprobs) for each in scored.continuations] == [3, 2]
        assert at_baseline(running)
