"""Short prompts by graph: what a pass makes of them, whatever pads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from griffin_core.experts.selection import Selection
from griffin_core.forward.prefill import Part, Prompt, PromptRead, launch
from griffin_core.model.load import load_model
from tests.gpu.devices import needs_cuda
from tests.tiny import FAMILIES, make_tiny

pytestmark = [pytest.mark.gpu, needs_cuda]


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_graph_makes_of_a_prompt_what_a_pass_does(name: str, tmp_path: Path) -> None:
    from griffin_core.backends.cuda.prompt_graph import PromptGraphs  # noqa: PLC0415  # needs triton

    where = str(make_tiny(name, tmp_path / name))
    decoder = load_model(where, dtype=torch.bfloat16, device="cuda").decoder
    graphs = PromptGraphs(decoder, most_tokens=512)
    kept: list[tuple[PromptRead, PromptRead]] = []
    for tokens in (1, 30, 128, 129, 200):
        made = []
        for run in (launch, graphs.launch):
            cache = decoder.new_cache(tokens + 3)
            for layer in range(len(decoder.layers)):
                cache.slice(layer, 0, tokens + 3).fill_(torch.nan)
            prompt = Prompt(decoder, range(5, 5 + tokens), Selection(density=0.5), cache=cache)
            made += run(decoder, [Part(prompt=prompt, tokens=tokens)]).end()
        kept.append((made[0], made[1]))
    for exact, got in kept:  # only now: a later prompt must not reach into an earlier one
        tokens = got.prompt.tokens
        assert error(got.finished.last_hidden, exact.finished.last_hidden) < 2e-2
        assert error(got.s2, exact.s2) < 2e-2
        for layer in range(len(decoder.layers)):
            theirs, ours = (each.prompt.cache for each in (exact, got))
            assert error(ours.slice(layer, 0, tokens), theirs.slice(layer, 0, tokens)) < 2e-2
            assert ours.slice(layer, tokens, tokens + 3).isnan().all()
