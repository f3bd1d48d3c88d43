"""The same models on CUDA: what the CPU generates in float32, the GPU generates too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from griffin_core.engine.limits import Limits
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.model.load import load_model
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.choices import Sharing
from tests.gpu.devices import needs_cuda
from tests.servers import eventually
from tests.tiny import FAMILIES, make_tiny
from tests.unit.core.engines import at_baseline, complete, engine, finish, submit

pytestmark = [pytest.mark.gpu, needs_cuda]


def task(
    density: float, prompt: int = 30, tokens: int = 24, sharing: Sharing = "private"
) -> GenerateTask:
    return GenerateTask(
        prompt=tuple(range(prompt)),
        stopping=StoppingParams(max_tokens=tokens, ignore_eos=True),
        pruning=PruningParams(density=density, sharing=sharing),
    )


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_cuda_generates_what_the_cpu_does(name: str, density: float, tmp_path: Path) -> None:
    where = str(make_tiny(name, tmp_path / name))
    made = []
    for device in ("cpu", "cuda"):
        model = load_model(where, dtype=torch.float32, device=device)
        with engine(model) as running:
            tokens, finished = complete(running, task(density))
            made.append((tokens, finished.pruning.experts_per_layer))
    assert made[0] == made[1]


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_generate_what_the_same_kernels_do_without(
    name: str, density: float, tmp_path: Path
) -> None:
    model = load_model(str(make_tiny(name, tmp_path / name)), dtype=torch.bfloat16, device="cuda")
    made = []
    for graphs in (True, False):
        with engine(model, cuda_graphs=graphs, limits=Limits(max_sessions=2)) as running:
            running.sessions().result(100)  # kernels are compiled first
            made.append(complete(running, task(density))[0])
    assert len(made[0]) == 24 and made[0] == made[1]


@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_many_sessions_of_other_lengths_come_and_go(sharing: Sharing, tmp_path: Path) -> None:
    model = load_model(
        str(make_tiny("llama", tmp_path / "llama")), dtype=torch.bfloat16, device="cuda"
    )
    with engine(model, prefill_source=None, limits=Limits(max_sessions=9)) as running:
        running.sessions().result(100)  # kernels are compiled first
        inboxes = [
            submit(running, task((0.5, 0.25, 1.0)[number % 3], 2 + number, 10 + number, sharing))[1]
            for number in range(30)
        ]
        ends = [finish(inbox) for inbox in inboxes]
        assert [len(tokens) for tokens, _ in ends] == list(range(10, 40))
        eventually(lambda: at_baseline(running))


def test_a_gpu_needs_no_compiler_for_cpus(tmp_path: Path) -> None:
    where = make_tiny("llama", tmp_path / "llama")
    program = f"""
import sys
import torch
from griffin_core import LLM
with LLM({str(where)!r}, dtype="bfloat16", device="cuda", density=0.5) as llm:
    llm.generate([[1, 2, 3]])
sys.exit(sorted({{"numba", "llvmlite"}} & set(sys.modules)) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
