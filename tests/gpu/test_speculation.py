"""Speculation on CUDA: the tokens are those without, on graphs of every size and without graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.model.load import Model, load_model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.speculation import SpeculationParams
from griffin_core.sampling.stopping import StoppingParams
from tests.gpu.devices import needs_cuda
from tests.tiny import make_tiny
from tests.unit.core.engines import at_baseline, complete, engine, finish, submit

pytestmark = [pytest.mark.gpu, needs_cuda]

PROMPT = (*range(30), 5, 6, *range(12))
SAMPLINGS: dict[str, Any] = {
    "two": {"allowed_token_ids": frozenset({20, 21}), "temperature": 0.4, "seed": 3},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 4},
    "penalized": {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.5},
    "bad words": {"temperature": 0.5, "seed": 6, "bad_words_ids": ((11, 12),)},
}
WAYS: dict[str, Any] = {
    "lookup": {"mode": "lookup"},
    "experts": {"mode": "lookup", "verify": "experts"},
    "slim": {"mode": "slim"},
    "auto": {"mode": "auto", "verify": "dense"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    where = make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")
    return load_model(str(where), dtype=torch.float32, device="cuda")


def made(way: str, sampling: str, **options: Any) -> GenerateTask:
    return GenerateTask(
        prompt=PROMPT,
        sampling=SamplingParams(**SAMPLINGS[sampling]),
        stopping=StoppingParams(max_tokens=40, ignore_eos=True),
        pruning=PruningParams(density=0.5, correction="none"),
        speculation=SpeculationParams(**WAYS[way]),
        top_logprobs=2,
        **options,
    )


def plain(task: GenerateTask) -> GenerateTask:
    density = 1.0 if task.speculation.lossless else 0.5
    return GenerateTask(
        prompt=task.prompt,
        sampling=task.sampling,
        stopping=task.stopping,
        pruning=PruningParams(density=density, correction="none"),
        top_logprobs=2,
    )


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("sessions", [2, 16])
def test_tokens_are_those_without(model: Model, graphs: bool, sessions: int) -> None:
    from griffin_core.engine.limits import Limits  # noqa: PLC0415

    limits = Limits(max_sessions=sessions)
    tasks = [made(way, sampling) for way in WAYS for sampling in SAMPLINGS]
    with engine(model, limits=limits, cuda_graphs=graphs, local_prefill_max_tokens=None) as running:
        expected = [complete(running, plain(task))[0] for task in tasks]
        for task, tokens in zip(tasks, expected, strict=True):
            assert complete(running, task)[0] == tokens, task.speculation
        inboxes = [submit(running, task)[1] for task in tasks]  # and all together
        for inbox, tokens in zip(inboxes, expected, strict=True):
            assert finish(inbox)[0] == tokens
        assert at_baseline(running)


@pytest.mark.parametrize("warmup", [50, 60])
def test_a_warm_up_chooses_what_it_chooses_on_the_cpu(
    model: Model, warmup: int, tmp_path: Path
) -> None:
    on_cpu = load_model(
        str(make_tiny("llama", tmp_path / "llama")), dtype=torch.float32, device="cpu"
    )
    task = GenerateTask(
        prompt=PROMPT,
        stopping=StoppingParams(max_tokens=40, ignore_eos=True),
        pruning=PruningParams(density=0.5, correction="none", warmup_tokens=warmup),
    )
    found = []
    for each in (on_cpu, model):
        with engine(each) as running:
            tokens, finished = complete(running, task)
            found.append((tokens, finished.pruning.dense_tokens))
    assert found[0] == found[1]
