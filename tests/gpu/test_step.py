"""A step as a CUDA graph equals the plain float32 one, whoever takes part, on whatever experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from griffin_core.decode.step import StepTokens, decode_tokens
from griffin_core.kv_cache import KvCache
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import load_model
from griffin_core.slim.base import SlimFF
from griffin_core.slim.masked import Masked
from tests.gpu.devices import needs_cuda
from tests.tiny import MODELS

pytestmark = [pytest.mark.gpu, needs_cuda]

if torch.cuda.is_available():
    from griffin_core.cuda.step import CudaStep
    from griffin_core.slim.costs import ASSUMED_COSTS, GraphCosts
    from griffin_core.slim.indexed import Indexed

ERROR = 4e-2
"""Relative, of float16 logits against float32 ones, over three layers of random weights."""

PROMPTS = ([1, 2, 3, 4, 5], [7, 8, 9], [11] * 12)
View = list[SlimFF]


def decoder_of(where: Path, dtype: torch.dtype, device: str = "cuda") -> Decoder:
    return load_model(str(where), dtype=dtype, device=device).decoder


@torch.inference_mode()
def prefilled(decoder: Decoder, prompt: list[int], capacity: int = 40) -> KvCache:
    cache = decoder.new_cache(capacity)
    ids = torch.tensor(prompt, device=decoder.device)
    x, batch = decoder.begin(ids, [(cache, len(prompt))])
    for index, layer in enumerate(decoder.layers):
        x = decoder.layer(index, x, batch, layer.ff)
    cache.advance(len(prompt))
    return cache


def random_sets(decoder: Decoder, k: int) -> list[Tensor]:
    every = decoder.spec.ff_width
    return [torch.randperm(every)[:k].sort().values.int() for _ in decoder.layers]


def dense(decoder: Decoder) -> View:
    return [layer.ff for layer in decoder.layers]


def on(form: Masked | Indexed, decoder: Decoder, sets: list[Tensor]) -> View:
    return [form.build(layer, own, "one") for layer, own in zip(decoder.layers, sets, strict=True)]


def views(kind: str, half: Decoder, single: Decoder) -> tuple[list[View], list[View]]:
    """Of three sessions, by index and masked."""
    if kind == "dense":
        return [dense(half)] * 3, [dense(single)] * 3
    counts = [44] if kind == "shared" else [44, 1, half.spec.ff_width - 1]
    sets = [random_sets(half, k) for k in counts]
    indexed = [on(Indexed(), half, own) for own in sets]
    masked = [on(Masked(), single, own) for own in sets]
    if kind == "shared":
        return indexed * 3, masked * 3
    if kind == "mixed":
        return [*indexed[:2], dense(half)], [*masked[:2], dense(single)]
    return indexed, masked


@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_the_plain_one_on_masked_experts(
    name: str, tiny_directory: Callable[[str], Path]
) -> None:
    half = decoder_of(tiny_directory(name), torch.float16)
    single = decoder_of(tiny_directory(name), torch.float32)
    graphs = CudaStep(half, max_tokens=4, graphs=True)
    plain = CudaStep(half, max_tokens=4, graphs=False)
    for kind, most_private in (
        ("dense", 0.0),
        ("shared", 0.0),
        ("private", 1.0),
        ("private", 0.0),  # zeroed
        ("mixed", 1.0),
        ("mixed", 0.0),
    ):
        for step in (graphs, plain):
            step._private_up_to = dict.fromkeys(step._private_up_to, most_private)
        by_index, masked = views(kind, half, single)
        for rows in ((0,), (0, 1, 2)):
            caches = [
                [prefilled(decoder, PROMPTS[row]) for row in rows]
                for decoder in (half, half, single)
            ]
            for token in range(20, 24):
                tokens = [
                    [
                        StepTokens(cache=cache, view=view[row], token_ids=[token + row])
                        for row, cache in zip(rows, own, strict=True)
                    ]
                    for own, view in zip(caches, (by_index, by_index, masked), strict=True)
                ]
                got = [result.logits.clone() for result in graphs(tokens[0])]
                again = plain(tokens[1])
                exact = decode_tokens(single, tokens[2])
                for one, two, three in zip(got, again, exact, strict=True):
                    assert torch.equal(one, two.logits)
                    error = (one - three.logits).norm() / three.logits.norm()
                    assert error <= ERROR, (kind, rows, float(error))


def test_new_sets_and_sessions_need_no_allocation_and_no_capture(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    step = CudaStep(decoder, max_tokens=2, graphs=True)
    some = [on(Indexed(), decoder, random_sets(decoder, 44)) for _ in range(20)]
    caches = [prefilled(decoder, [1, 2, 3], 256) for _ in range(4)]

    def run(turn: int) -> None:
        step(
            [
                StepTokens(
                    cache=caches[(turn + row) % 4],
                    view=some[(turn + row) % 20],
                    token_ids=[turn % 200],
                )
                for row in range(2)
            ]
        )
        for cache in caches:
            cache.length = 3

    run(0)
    torch.cuda.synchronize()
    graphs = dict(step._graphs)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for turn in range(1000):
        run(turn)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert step._graphs == graphs


def test_a_full_cache_is_refused_before_anything_is_written(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    step = CudaStep(decoder, max_tokens=1, graphs=True)
    cache = prefilled(decoder, [1, 2, 3], capacity=3)
    with pytest.raises(ValueError, match="does not fit"):
        step([StepTokens(cache=cache, view=dense(decoder), token_ids=[4])])


def test_more_tokens_and_more_sessions_than_graphs_take_run_layer_by_layer(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    step = CudaStep(decoder, max_tokens=1, graphs=True)
    view = on(Indexed(), decoder, random_sets(decoder, 44))
    for ids in ([[5, 6, 7]], [[5], [6]]):
        pairs = []
        for _ in range(2):
            pairs.append(
                [
                    StepTokens(cache=prefilled(decoder, [1, 2, 3]), view=view, token_ids=i)
                    for i in ids
                ]
            )
        for one, two in zip(step(pairs[0]), decode_tokens(decoder, pairs[1]), strict=True):
            assert torch.equal(one.logits, two.logits)


def test_a_set_each_runs_where_it_costs_no_more_and_zeroed_where_it_would(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    step = CudaStep(decoder, max_tokens=16, graphs=True)
    assert all((size, "zeroed") in step._graphs for size in (2, 4, 8, 16))
    assert (16, "private") not in step._graphs
    step._private_up_to = {1: 1.0, 2: 0.6, 4: 0.3, 8: 0.0}
    some = [on(Indexed(), decoder, random_sets(decoder, k)) for k in (44, 22, 22)]
    cache = prefilled(decoder, [1, 2, 3])

    def mode(*of: View) -> str:
        tokens = [StepTokens(cache=cache, view=view, token_ids=[1]) for view in of]
        return step._mode(tokens, 1 << (len(of) - 1).bit_length())

    assert mode(dense(decoder)) == mode(dense(decoder), dense(decoder)) == "dense"
    assert mode(some[0]) == "private"
    assert mode(some[0], some[0]) == "shared"
    assert mode(some[0], some[1]) == "private"
    assert mode(some[0], dense(decoder)) == "zeroed"
    assert mode(*some) == "zeroed"
    assert mode(some[1], some[2], some[1]) == "private"


def test_costs_are_measured_on_the_graphs_and_leaves_no_trace(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    measured, fresh = (CudaStep(decoder, max_tokens=4, graphs=True) for _ in range(2))
    costs = measured.measure_costs()
    assert isinstance(costs, GraphCosts)
    assert set(costs.dense) == set(costs.private) == {1, 2, 4}
    assert set(costs.zeroed) == set(costs.shared) == {2, 4}
    for own in ([0.5], [0.5] * 3, [0.01, 1.0]):
        assert costs.step_s(dense=0, own=own, shared=[]) > 0
    assert CudaStep(decoder, max_tokens=4, graphs=False).measure_costs() is ASSUMED_COSTS
    view = on(Indexed(), decoder, random_sets(decoder, 44))
    made = []
    for step in (measured, fresh):
        caches = [prefilled(decoder, prompt) for prompt in PROMPTS]
        tokens = [StepTokens(cache=cache, view=view, token_ids=[5]) for cache in caches]
        made.append(torch.cat([result.logits.clone() for result in step(tokens)]))
    assert torch.equal(*made)
