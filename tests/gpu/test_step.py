"""A step as a CUDA graph equals the plain float32 one, whoever takes part, on whatever experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from griffin_core.backends.base import RunFF
from griffin_core.forward.decode import StepRow, StepTokens, decode_tokens
from griffin_core.kv.cache import KvCache
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import load_model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.masked import Masked
from tests.gpu.devices import needs_cuda
from tests.tiny import MODELS

pytestmark = [pytest.mark.gpu, needs_cuda]

if torch.cuda.is_available():
    from griffin_core.backends.cuda.step import CudaStep
    from griffin_core.slim.costs import ASSUMED_COSTS, GraphCosts
    from griffin_core.slim.indexed import Indexed

ERROR = 4e-2
"""Relative, of float16 logits against float32 ones, over three layers of random weights."""

PROMPTS = ([1, 2, 3, 4, 5], [7, 8, 9], [11] * 12)
View = list[RunFF]


def decoder_of(where: Path, dtype: torch.dtype, device: str = "cuda") -> Decoder:
    return load_model(str(where), dtype=dtype, device=device).decoder


@torch.inference_mode()
def prefilled(decoder: Decoder, prompt: list[int], capacity: int = 40) -> KvCache:
    cache = decoder.new_cache(capacity)
    ids = torch.tensor(prompt, device=decoder.device)
    x, attention = decoder.prepare_batch(ids, [(cache, len(prompt))])
    for index, layer in enumerate(decoder.layers):
        x = decoder.layer(index, x, attention, layer.ff)
    cache.advance(len(prompt))
    return cache


def sampler_of(decoder: Decoder, slots: int = 16) -> Sampler:
    """All of whose slots are greedy."""
    vocabulary = decoder.spec.vocabulary
    sampler = Sampler(slots=slots, vocabulary=vocabulary, device=decoder.device)
    for slot in range(slots):
        sampler.open(slot, SamplingParams(), [])
    return sampler


def graphs_of(decoder: Decoder, max_tokens: int, graphs: bool = True) -> CudaStep:
    return CudaStep(decoder, sampler_of(decoder), max_tokens=max_tokens, graphs=graphs)


def rows_of(
    step: CudaStep, ids: list[int], caches: list[KvCache], views: list[View]
) -> list[StepRow]:
    """Rows that run the given tokens, as if their slots had drawn them."""
    sampler = step.sampler
    sampler.drawn[: len(ids)] = torch.tensor(ids, device=sampler.drawn.device)
    return [
        StepRow(cache=cache, view=view, slot=slot)
        for slot, (cache, view) in enumerate(zip(caches, views, strict=True))
    ]


def random_sets(decoder: Decoder, k: int) -> list[Tensor]:
    every = decoder.spec.ff_width
    return [torch.randperm(every)[:k].sort().values.int() for _ in decoder.layers]


def dense(decoder: Decoder) -> View:
    return [layer.ff for layer in decoder.layers]


def on(form: Masked | Indexed, decoder: Decoder, sets: list[Tensor]) -> View:
    return [form.build(layer, own, "gemv") for layer, own in zip(decoder.layers, sets, strict=True)]


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
    graphs, plain = graphs_of(half, 4), graphs_of(half, 4, graphs=False)
    for kind, most_private in (
        ("dense", 0.0),
        ("shared", 0.0),
        ("private", 1.0),
        ("private", 0.0),  # zeroed
        ("mixed", 1.0),
        ("mixed", 0.0),
    ):
        for step in (graphs, plain):
            step.private_up_to = dict.fromkeys(step.private_up_to, most_private)
        by_index, masked = views(kind, half, single)
        for rows in ((0,), (0, 1, 2)):
            caches = [
                [prefilled(decoder, PROMPTS[row]) for row in rows]
                for decoder in (half, half, single)
            ]
            for token in range(20, 24):
                ids = [token + row for row in rows]
                index, masks = ([own[row] for row in rows] for own in (by_index, masked))
                draw = graphs.launch(rows_of(graphs, ids, caches[0], index))
                got = draw.logits.clone()
                again = plain.launch(rows_of(plain, ids, caches[1], index)).logits
                tokens = [
                    StepTokens(cache=cache, view=view, token_ids=[one])
                    for one, cache, view in zip(ids, caches[2], masks, strict=True)
                ]
                exact = torch.cat(decode_tokens(single, tokens))
                assert torch.equal(got, again)
                assert [one.token for one in draw.wait()] == got.argmax(dim=1).tolist()
                for one, three in zip(got, exact, strict=True):
                    error = (one - three).norm() / three.norm()
                    assert error <= ERROR, (kind, rows, float(error))


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_steps_launched_before_their_tokens_are_read_draw_the_same(
    density: float, tiny_directory: Callable[[str], Path]
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    step = graphs_of(decoder, 4)
    k = int(density * decoder.spec.ff_width)
    view = on(Indexed(), decoder, random_sets(decoder, k)) if density < 1 else dense(decoder)
    made: list[list[list[int]]] = []
    for ahead in (0, 1):
        caches = [prefilled(decoder, prompt) for prompt in PROMPTS]
        rows = rows_of(step, [5, 6, 7], caches, [view] * 3)
        draws, tokens = [], []
        for _ in range(20):
            draws.append(step.launch(rows))
            if len(draws) > ahead:
                tokens.append([one.token for one in draws.pop(0).wait()])
        tokens += [[one.token for one in draw.wait()] for draw in draws]
        made.append(tokens)
    assert made[0] == made[1]


def test_new_sets_and_sessions_need_no_allocation_and_no_capture(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    step = graphs_of(decoder, 2)
    some = [on(Indexed(), decoder, random_sets(decoder, 44)) for _ in range(20)]
    caches = [prefilled(decoder, [1, 2, 3], 256) for _ in range(4)]

    def run(turn: int) -> None:
        rows = [
            StepRow(cache=caches[(turn + row) % 4], view=some[(turn + row) % 20], slot=row)
            for row in range(2)
        ]
        step.launch(rows).wait()
        for cache in caches:
            cache.length = 3

    run(0)
    torch.cuda.synchronize()
    graphs = dict(step.graphs)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for turn in range(1000):
        run(turn)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert step.graphs == graphs


def test_a_full_cache_is_refused_before_anything_is_written(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    step = graphs_of(decoder, 1)
    cache = prefilled(decoder, [1, 2, 3], capacity=3)
    with pytest.raises(ValueError, match="does not fit"):
        step.launch(rows_of(step, [4], [cache], [dense(decoder)]))


def test_more_sessions_than_graphs_take_run_in_several(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    step = graphs_of(decoder, 1)
    view = on(Indexed(), decoder, random_sets(decoder, 44))
    caches = [prefilled(decoder, prompt) for prompt in PROMPTS]
    together = [
        one.token for one in step.launch(rows_of(step, [5, 6, 7], caches, [view] * 3)).wait()
    ]
    assert [cache.length for cache in caches] == [len(prompt) + 1 for prompt in PROMPTS]
    alone = []
    for token, prompt in zip([5, 6, 7], PROMPTS, strict=True):
        rows = rows_of(step, [token], [prefilled(decoder, prompt)], [view])
        alone.append(step.launch(rows).wait()[0].token)
    assert together == alone


def test_a_set_each_runs_where_it_costs_no_more_and_zeroed_where_it_would(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    step = graphs_of(decoder, 16)
    assert all((size, "zeroed") in step.graphs for size in (2, 4, 8, 16))
    assert (16, "private") not in step.graphs
    step.private_up_to = {1: 1.0, 2: 0.6, 4: 0.3, 8: 0.0}
    some = [on(Indexed(), decoder, random_sets(decoder, k)) for k in (44, 22, 22)]
    cache = prefilled(decoder, [1, 2, 3])

    def mode(*of: View) -> str:
        rows = [StepRow(cache=cache, view=view, slot=0) for view in of]
        return step.mode(rows, 1 << (len(of) - 1).bit_length())

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
    measured, fresh = (graphs_of(decoder, 4) for _ in range(2))
    costs = measured.measure_costs()
    assert isinstance(costs, GraphCosts)
    assert set(costs.dense) == set(costs.private) == {1, 2, 4}
    assert set(costs.zeroed) == set(costs.shared) == {2, 4}
    for own in ([0.5], [0.5] * 3, [0.01, 1.0]):
        assert costs.step_s(dense=0, own=own, shared=[]) > 0
    assert graphs_of(decoder, 4, graphs=False).measure_costs() is ASSUMED_COSTS
    view = on(Indexed(), decoder, random_sets(decoder, 44))
    made = []
    for step in (measured, fresh):
        caches = [prefilled(decoder, prompt) for prompt in PROMPTS]
        made.append(step.launch(rows_of(step, [5] * 3, caches, [view] * 3)).logits.clone())
    assert torch.equal(*made)
