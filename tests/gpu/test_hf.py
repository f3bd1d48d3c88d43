"""``sparsify`` on CUDA: what it makes on the CPU, also where transformers compiles the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from griffin_core import sparsify
from tests.gpu.devices import needs_cuda
from tests.tiny import make_tiny

pytestmark = [pytest.mark.gpu, needs_cuda]


@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:The CUDA Graph is empty")  # torch's own
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cuda_makes_the_tokens_that_the_cpu_makes(cache: str, tmp_path: Path) -> None:
    where = make_tiny("llama", tmp_path / "llama")
    ids = torch.arange(60).view(2, 30)
    made = {}
    for device in ("cpu", "cuda"):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).to(device)
        model.generation_config.eos_token_id = None
        prompt = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
        options = {"do_sample": False, "max_new_tokens": 16, "cache_implementation": cache}
        dense = model.generate(**prompt, **options).tolist()
        with sparsify(model, ids, density=0.5):
            made[device] = model.generate(**prompt, **options).tolist()
        assert model.generate(**prompt, **options).tolist() == dense != made[device]
    assert made["cuda"] == made["cpu"]
