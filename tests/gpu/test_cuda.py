"""The same models on CUDA: what the CPU generates in float32, the GPU generates too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from griffin_core.decode.stopping import StoppingParams
from griffin_core.decode.task import GenerateTask, PruningParams
from griffin_core.model.load import load_model
from tests.core.engines import complete, engine
from tests.tiny import FAMILIES, make_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_cuda_generates_what_the_cpu_does(name: str, density: float, tmp_path: Path) -> None:
    where = str(make_tiny(name, tmp_path / name))
    made = []
    for device in ("cpu", "cuda"):
        model = load_model(where, dtype=torch.float32, device=device)
        task = GenerateTask(
            prompt=tuple(range(30)),
            stopping=StoppingParams(max_tokens=24, ignore_eos=True),
            pruning=PruningParams(density=density),
        )
        with engine(model) as running:
            tokens, finished = complete(running, task)
            made.append((tokens, finished.pruning.experts_per_layer))
    assert made[0] == made[1]
