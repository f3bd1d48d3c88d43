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
    for kind in ("dense", "shared", "private", "mixed"):
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


def test_the_crossover_is_measured_on_the_graphs_and_leaves_no_trace(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    measured, fresh = (CudaStep(decoder, max_tokens=4, graphs=True) for _ in range(2))
    limit = measured.private_limit()
    assert all(1 <= limit(density) <= 4 for density in (0.01, 0.5, 1.0))
    assert CudaStep(decoder, max_tokens=4, graphs=False).private_limit()(0.5) == 2  # by bytes
    view = on(Indexed(), decoder, random_sets(decoder, 44))
    made = []
    for step in (measured, fresh):
        caches = [prefilled(decoder, prompt) for prompt in PROMPTS]
        tokens = [StepTokens(cache=cache, view=view, token_ids=[5]) for cache in caches]
        made.append(torch.cat([result.logits.clone() for result in step(tokens)]))
    assert torch.equal(*made)
