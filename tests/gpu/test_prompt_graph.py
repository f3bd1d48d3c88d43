"""Short prompts by graph: what a pass makes of them, whatever pads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.selection import Selection
from griffin_core.forward.prefill import launch
from griffin_core.forward.prompt import (
    Part,
    Prompt,
)
from griffin_core.forward.prompt_pass import PromptRead
from griffin_core.model.load import load_model
from tests.gpu.devices import needs_cuda
from tests.tiny import FAMILIES, make_tiny

pytestmark = [pytest.mark.gpu, needs_cuda]


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_graph_makes_of_a_prompt_what_a_pass_does(name: str, tmp_path: Path) -> None:
    from griffin_core.forward.prompt_graphs import PromptGraphs  # noqa: PLC0415  # needs triton

    where = str(make_tiny(name, tmp_path / name))
    decoder = load_model(where, dtype=torch.bfloat16, device="cuda").decoder
    pool = decoder.new_pool(2000)
    graphs = PromptGraphs(decoder, pool, most_tokens=512, tails=True)
    residual = Selection(density=0.5, correction=CorrectionParams(kind="residual", rank=8))
    kept: list[tuple[PromptRead, PromptRead]] = []
    for tokens in (1, 30, 128, 129, 200):
        made = []
        for run in (launch, graphs.launch):
            cache = pool.allocate(tokens + 3)
            for layer in range(len(decoder.layers)):
                cache.slice(layer, 0, tokens + 3).fill_(torch.nan)
            prompt = Prompt(decoder, range(5, 5 + tokens), residual, cache=cache)
            made += run(decoder, [Part(prompt=prompt, tokens=tokens)]).end()
        kept.append((made[0], made[1]))
    for exact, got in kept:  # only now: a later prompt must not reach into an earlier one
        tokens = got.prompt.tokens
        assert error(got.finished.last_hidden, exact.finished.last_hidden) < 2e-2
        assert error(got.statistics.s2, exact.statistics.s2) < 2e-2
        fitted = [[tail for part in each.tails for tail in part] for each in (exact, got)]
        assert len(fitted[0]) == len(fitted[1]) == (len(decoder.layers) if tokens >= 128 else 0)
        for other, one in zip(*fitted, strict=True):
            assert one.x.shape[0] == one.z.shape[0] == tokens
            assert error(one.x, other.x) < 3e-2 and error(one.z, other.z) < 3e-2
        for layer in range(len(decoder.layers)):
            theirs, ours = (each.prompt.cache for each in (exact, got))
            assert error(ours.slice(layer, 0, tokens), theirs.slice(layer, 0, tokens)) < 2e-2
            assert ours.slice(layer, tokens, tokens + 3).isnan().all()


@torch.inference_mode()
def test_prompts_that_no_graph_can_read_are_read_without_one(tmp_path: Path) -> None:
    """Those of another pool, those that follow cached tokens, and several at once."""
    from griffin_core.forward.prompt_graphs import PromptGraphs  # noqa: PLC0415  # needs triton

    where = str(make_tiny("llama", tmp_path / "llama"))
    decoder = load_model(where, dtype=torch.bfloat16, device="cuda").decoder
    pool = decoder.new_pool(600)
    graphs = PromptGraphs(decoder, pool, most_tokens=128)

    def read(lengths: Sequence[int], *, own_pools: bool, chunk: int) -> list[PromptRead]:
        prompts = [
            Prompt(
                decoder,
                range(5, 5 + tokens),
                Selection(density=0.5),
                cache=None if own_pools else pool.allocate(tokens),
            )
            for tokens in lengths
        ]
        done: list[PromptRead] = []
        while any(prompt.left for prompt in prompts):
            parts = [
                Part(prompt=prompt, tokens=min(chunk, prompt.left))
                for prompt in prompts
                if prompt.left
            ]
            done += graphs.launch(decoder, parts).end()
        for prompt in prompts:
            prompt.cache.free()
        return done

    (exact,) = read([30], own_pools=False, chunk=128)
    for others in (
        read([30], own_pools=True, chunk=128),
        read([30], own_pools=False, chunk=29),  # the last pass has one token
        read([30, 30], own_pools=False, chunk=30),
    ):
        for got in others:
            assert error(got.finished.last_hidden, exact.finished.last_hidden) < 2e-2
            assert error(got.statistics.s2, exact.statistics.s2) < 2e-2
