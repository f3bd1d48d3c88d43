"""Steps as CUDA graphs equal plain float32 ones, whichever sequences take part, on any experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from griffin_core.backends.base import RunFF
from griffin_core.backends.batch import DRAWN, StepSequence
from griffin_core.experts.correction import Correction
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.forward.decode import StepTokens, decode_tokens
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import load_model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.sampler import Sampler
from griffin_core.slim.corrected import corrected_block
from griffin_core.slim.masked import Masked
from griffin_core.slim.views import WholeView
from tests.gpu.devices import needs_cuda
from tests.tiny import MODELS

pytestmark = [pytest.mark.gpu, needs_cuda]

if torch.cuda.is_available():
    from griffin_core.forward.graphs import GraphStep
    from griffin_core.slim.costs import ASSUMED_COSTS, GraphCosts
    from griffin_core.slim.indexed import IndexTable

ERROR = 4e-2
"""Relative, of float16 logits against float32 ones, over three layers of random weights."""

PROMPTS = ([1, 2, 3, 4, 5], [7, 8, 9], [11] * 12)
View = list[RunFF]


def decoder_of(where: Path, dtype: torch.dtype, device: str = "cuda") -> Decoder:
    return load_model(str(where), dtype=dtype, device=device).decoder


@torch.inference_mode()
def prefilled(
    decoder: Decoder, prompt: Sequence[int], capacity: int = 40, pool: KvPool | None = None
) -> KvCache:
    """A cache that holds a prompt, all of whose other slots hold NaN."""
    cache = (pool or decoder.new_pool(capacity)).allocate(capacity)
    for layer in range(len(decoder.layers)):
        cache.slice(layer, 0, capacity).fill_(torch.nan)
    ids = torch.tensor(prompt, device=decoder.device)
    x, attention = decoder.prepare_batch(ids, [(cache, len(prompt))])
    decoder.forward(x, attention, decoder.dense)
    cache.advance(len(prompt))
    return cache


def sampler_of(decoder: Decoder, slots: int = 16) -> Sampler:
    """All of whose slots are greedy."""
    vocabulary = decoder.spec.vocab_size
    sampler = Sampler(slots=slots, vocab_size=vocabulary, backend=decoder.backend)
    for slot in range(slots):
        sampler.open(slot, SamplingParams(), [])
    return sampler


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A step, and the pool and the table that it runs on."""

    decoder: Decoder
    pool: KvPool
    slims: IndexTable
    step: GraphStep

    def view(self, experts: SlimSpec | None) -> WholeView:
        """A view of a set, for as long as it is held; of all neurons for None."""
        view = WholeView([], experts)
        if experts is not None:
            view.slim_id = self.slims.add(view)
        return view

    def prefilled(self, prompt: Sequence[int], capacity: int = 40) -> KvCache:
        return prefilled(self.decoder, prompt, capacity, self.pool)

    def drawn(
        self, ids: Sequence[int], caches: Sequence[KvCache], views: Sequence[WholeView]
    ) -> list[StepSequence]:
        """Sequences that run the given tokens, as if their slots had drawn them."""
        drawn = self.step.sampler.drawn
        drawn[: len(ids)] = torch.tensor(ids, device=drawn.device)
        return [
            sequence(cache, view, slot=slot)
            for slot, (cache, view) in enumerate(zip(caches, views, strict=True))
        ]

    def launch(self, sequences: Sequence[StepSequence], caches: Sequence[KvCache]) -> Tensor:
        """The logits of a step, whose tokens are then cached."""
        logits = self.step.launch(sequences, [None] * len(sequences)).logits.clone()
        for cache, each in zip(caches, sequences, strict=True):
            cache.advance(len(each.token_ids))
        return logits


def sequence(
    cache: KvCache, view: WholeView, token_ids: Sequence[int] = (DRAWN,), slot: int | None = None
) -> StepSequence:
    return StepSequence(
        first_slot=cache.first_slot,
        cached=cache.length,
        token_ids=tuple(token_ids),
        slim_id=view.slim_id,
        slot=slot,
    )


def steps_of(decoder: Decoder, max_sequences: int, graphs: bool = True) -> Steps:
    pool, slims = decoder.new_pool(2000), IndexTable(decoder, sets=24, rank=8)
    step = GraphStep(
        decoder=decoder,
        pool=pool,
        sampler=sampler_of(decoder),
        slims=slims,
        max_sequences=max_sequences,
        graphs=graphs,
    )
    return Steps(decoder=decoder, pool=pool, slims=slims, step=step)


def random_set(decoder: Decoder, *counts: int) -> SlimSpec:
    """A set with these numbers of experts, layer by layer and again from the first."""
    every = decoder.spec.intermediate_size
    of_layers = [counts[layer % len(counts)] for layer in range(len(decoder.layers))]
    layers = [torch.randperm(every)[:k].sort().values.int() for k in of_layers]
    return SlimSpec.of_layers(every, layers)


def dense(decoder: Decoder) -> View:
    return [layer.ff for layer in decoder.layers]


def masked(decoder: Decoder, experts: SlimSpec | None) -> View:
    """The plain form of a set."""
    if experts is None:
        return dense(decoder)
    correction = experts.correction and experts.correction.to(decoder.device)
    view: View = []
    for index, (layer, own) in enumerate(zip(decoder.layers, experts.layers, strict=True)):
        block = Masked().build(layer, own, "gemv")
        view.append(corrected_block(decoder.backend, block, correction, index))
    return view


def corrected(decoder: Decoder, experts: SlimSpec, rank: int) -> SlimSpec:
    """The same with a random correction, of values that float16 holds exactly."""
    shape = (len(decoder.layers), rank, decoder.spec.hidden_size)
    bias, into, out = ((0.05 * torch.randn(of)).half().float() for of in (shape[::2], shape, shape))
    own = Correction(bias=bias, into=into, out=out) if rank else Correction(bias=bias)
    return replace(experts, correction=own)


def sets_of(kind: str, decoder: Decoder) -> list[SlimSpec | None]:
    """Of three sessions; the same object where they share it."""
    width = decoder.spec.intermediate_size
    # A norm after the FF makes an output that is nearly zero as large as any other: of one neuron
    # alone, float16 may then give even another sign.
    few = 8 if decoder.spec.sandwich_norms else 1
    match kind:
        case "dense":
            return [None] * 3
        case "shared":
            return [random_set(decoder, 44)] * 3
        case "uneven":
            return [random_set(decoder, 44, width, 20), random_set(decoder, 30, 60), None]
        case "shared, corrected":
            return [corrected(decoder, random_set(decoder, 44), 8)] * 3
        case "corrected":
            plain = random_set(decoder, 40)
            return [
                corrected(decoder, random_set(decoder, 44, 30), 8),
                corrected(decoder, plain, 0),
                corrected(decoder, plain, 5),
            ]
        case "mixed":
            return [random_set(decoder, 44), random_set(decoder, few), None]
        case _:
            return [random_set(decoder, k) for k in (44, few, width - 1)]


def by_set(sets: Sequence[SlimSpec | None], make: Callable[[SlimSpec | None], View]) -> list[View]:
    """One view for each set, the same for the same."""
    views = {id(own): make(own) for own in sets}
    return [views[id(own)] for own in sets]


def close(got: Tensor, exact: Tensor, *about: object) -> None:
    """Row by row."""
    assert len(got) == len(exact)
    for one, three in zip(got, exact, strict=True):
        error = (one - three).norm() / three.norm()
        assert error <= ERROR, (*about, float(error))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_the_plain_one_on_masked_experts(
    name: str, tiny_directory: Callable[[str], Path]
) -> None:
    half = decoder_of(tiny_directory(name), torch.float16)
    single = decoder_of(tiny_directory(name), torch.float32)
    graphs, plain = steps_of(half, 4), steps_of(half, 4, graphs=False)
    for kind, most_private in (
        ("dense", 0.0),
        ("shared", 0.0),
        ("private", 1.0),
        ("private", 0.0),  # zeroed
        ("uneven", 1.0),
        ("uneven", 0.0),
        ("mixed", 1.0),
        ("mixed", 0.0),
        ("shared, corrected", 0.0),
        ("corrected", 1.0),
        ("corrected", 0.0),
        ("private", 1.0),  # again, on ids that had a correction
    ):
        sets = sets_of(kind, half)
        masks = by_set(sets, lambda own: masked(single, own))
        views = []
        for run in (graphs, plain):
            step = run.step
            step.private_up_to = dict.fromkeys(step.private_up_to, most_private)
            views.append(by_set(sets, run.view))
        for rows in ((0,), (0, 1, 2)):
            caches = [[run.prefilled(PROMPTS[row]) for row in rows] for run in (graphs, plain)]
            pool = single.new_pool(200)
            exact_caches = [prefilled(single, PROMPTS[row], pool=pool) for row in rows]
            for token in range(20, 24):
                ids = [token + row for row in rows]
                made = []
                for run, own, all_views in zip((graphs, plain), caches, views, strict=True):
                    sequences = run.drawn(ids, own, [all_views[row] for row in rows])
                    draw = run.step.launch(sequences, [None] * len(rows))
                    made.append(draw.logits.clone())
                    tokens = [one.token for one in draw.wait()]
                    assert tokens == made[-1].argmax(dim=1).tolist()
                    for cache in own:
                        cache.advance(1)
                assert torch.equal(*made)
                exact = decode_tokens(
                    single,
                    [
                        StepTokens(cache=cache, view=masks[row], token_ids=[one])
                        for one, cache, row in zip(ids, exact_caches, rows, strict=True)
                    ],
                )
                close(made[0], torch.cat(exact), kind, rows)
            for cache in [cache for own in caches for cache in own]:
                cache.free()


NEW = ([21], [22, 23, 24], [25, 26])
"""New tokens of three sequences of one step."""


@pytest.mark.parametrize("most", [16, 4])  # by graph; more rows than any graph has
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "opt"])
def test_several_tokens_of_a_sequence_are_that_many_steps(
    name: str, most: int, tiny_directory: Callable[[str], Path]
) -> None:
    half = decoder_of(tiny_directory(name), torch.float16)
    single = decoder_of(tiny_directory(name), torch.float32)
    run = steps_of(half, most)
    for kind in ("dense", "shared", "private", "mixed"):
        sets = sets_of(kind, half)
        views = by_set(sets, run.view)
        together = [run.prefilled(prompt) for prompt in PROMPTS]
        sequences = [
            sequence(cache, view, ids, slot)
            for slot, (cache, view, ids) in enumerate(zip(together, views, NEW, strict=True))
        ]
        got = run.launch(sequences, together)
        steps = [run.prefilled(prompt) for prompt in PROMPTS]
        rows = []
        for cache, view, ids in zip(steps, views, NEW, strict=True):
            rows += [run.launch([sequence(cache, view, [one], 0)], [cache]) for one in ids]
        close(got, torch.cat(rows), kind)
        pool = single.new_pool(200)
        exact = decode_tokens(
            single,
            [
                StepTokens(cache=prefilled(single, prompt, pool=pool), view=view, token_ids=ids)
                for prompt, view, ids in zip(
                    PROMPTS, by_set(sets, lambda own: masked(single, own)), NEW, strict=True
                )
            ],
        )
        close(got, torch.cat(exact), kind)
        for ours, theirs in zip(together, steps, strict=True):
            for layer in range(len(half.layers)):
                one, other = (each.slice(layer, 0, each.length) for each in (ours, theirs))
                close(one.flatten(0, 1).float(), other.flatten(0, 1).float(), kind, layer)
                assert ours.slice(layer, ours.length, ours.capacity).isnan().all()
        for cache in (*together, *steps):
            cache.free()


@pytest.mark.parametrize("most", [8, 4])
def test_scores_and_draws_run_in_one_step(most: int, tiny_directory: Callable[[str], Path]) -> None:
    """A sequence that draws what its slot's last token leads to, one that is only scored, and one
    that verifies drafted tokens and draws after the last."""
    half = decoder_of(tiny_directory("llama"), torch.float16)
    run = steps_of(half, most)
    views = [run.view(own) for own in (random_set(half, 44), random_set(half, 22), None)]
    caches = [run.prefilled(prompt) for prompt in PROMPTS]
    drawn = run.step.sampler.drawn
    drawn[:16] = 5
    sequences = [
        sequence(caches[0], views[0], slot=3),
        sequence(caches[1], views[1], [22, 23, 24]),
        sequence(caches[2], views[2], [25, 26], slot=1),
    ]
    draw = run.step.launch(sequences, [2, None, 0])
    logits = draw.logits.clone()
    made = draw.wait()
    assert [one.token for one in made] == logits[[0, 5]].argmax(dim=1).tolist()
    assert drawn[:16].tolist() == [
        {3: made[0].token, 1: made[1].token}.get(slot, 5) for slot in range(16)
    ]
    for one, row, top in ((made[0], logits[0], 2), (made[1], logits[5], 0)):
        assert one.logprobs is not None and len(one.logprobs.top) == top
        exact = row.log_softmax(dim=0)[one.token].item()
        assert one.logprobs.chosen == pytest.approx(exact, rel=1e-3, abs=1e-4)
    alone = []
    for prompt, view, ids in zip(PROMPTS, views, ([5], [22, 23, 24], [25, 26]), strict=True):
        cache = run.prefilled(prompt)
        alone.append(run.launch([sequence(cache, view, ids)], [cache]))
    close(logits, torch.cat(alone))


def test_more_scores_than_graphs_have_rows_keep_all_their_logits(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.float16)
    run = steps_of(decoder, 1)
    views = [run.view(own) for own in (random_set(decoder, 44), random_set(decoder, 22), None)]
    caches = [run.prefilled(prompt) for prompt in PROMPTS]
    each = [sequence(cache, view, [9]) for cache, view in zip(caches, views, strict=True)]
    together = run.step.launch(each, [None] * 3).logits.clone()
    alone = [run.step.launch([one], [None]).logits.clone() for one in each]
    close(together, torch.cat(alone))


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_steps_launched_before_their_tokens_are_read_draw_the_same(
    density: float, tiny_directory: Callable[[str], Path]
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    run = steps_of(decoder, 4)
    k = int(density * decoder.spec.intermediate_size)
    view = run.view(random_set(decoder, k) if density < 1 else None)
    made: list[list[list[int]]] = []
    for ahead in (0, 1):
        caches = [run.prefilled(prompt) for prompt in PROMPTS]
        run.drawn([5, 6, 7], caches, [view] * 3)
        draws, tokens = [], []
        for _ in range(20):
            each = [sequence(cache, view, slot=slot) for slot, cache in enumerate(caches)]
            draws.append(run.step.launch(each, [None] * 3))
            for cache in caches:
                cache.advance(1)
            if len(draws) > ahead:
                tokens.append([one.token for one in draws.pop(0).wait()])
        tokens += [[one.token for one in draw.wait()] for draw in draws]
        made.append(tokens)
    assert made[0] == made[1]


def test_new_sets_and_sessions_need_no_allocation_and_no_capture(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    run = steps_of(decoder, 2)
    some = [run.view(random_set(decoder, 44)) for _ in range(20)]
    caches = [run.prefilled([1, 2, 3], 256) for _ in range(4)]

    def step(turn: int) -> None:
        each = [
            sequence(caches[(turn + row) % 4], some[(turn + row) % 20], slot=row)
            for row in range(2)
        ]
        run.step.launch(each, [None] * 2).wait()

    step(0)
    torch.cuda.synchronize()
    graphs = dict(run.step.graphs)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for turn in range(1000):
        step(turn)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert run.step.graphs == graphs


def test_a_full_cache_is_refused_before_anything_is_written(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    pool = decoder.new_pool(20)
    full, other = prefilled(decoder, [1, 2, 3], 3, pool), pool.allocate(2)
    for layer in range(len(decoder.layers)):
        other.slice(layer, 0, 2).fill_(torch.nan)
    with pytest.raises(ValueError, match="do not fit"):
        decode_tokens(decoder, [StepTokens(cache=full, view=dense(decoder), token_ids=[4])])
    assert full.length == 3
    assert all(other.slice(n, 0, 2).isnan().all() for n in range(len(decoder.layers)))


def test_more_sessions_than_graphs_take_run_in_several(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    run = steps_of(decoder, 1)
    view = run.view(random_set(decoder, 44))
    caches = [run.prefilled(prompt) for prompt in PROMPTS]
    each = run.drawn([5, 6, 7], caches, [view] * 3)
    together = [one.token for one in run.step.launch(each, [None] * 3).wait()]
    alone = []
    for token, prompt in zip([5, 6, 7], PROMPTS, strict=True):
        each = run.drawn([token], [run.prefilled(prompt)], [view])
        alone.append(run.step.launch(each, [None]).wait()[0].token)
    assert together == alone


def test_a_set_each_runs_where_it_costs_no_more_and_zeroed_where_it_would(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    run = steps_of(decoder, 16)
    step = run.step
    assert all((size, "zeroed") in step.graphs for size in (2, 4, 8, 16))
    assert (16, "private") not in step.graphs
    step.private_up_to = {1: 1.0, 2: 0.6, 4: 0.3, 8: 0.0}
    some = [run.view(random_set(decoder, k)) for k in (44, 22, 22)]
    cache, whole = run.prefilled([1, 2, 3]), run.view(None)

    def mode(*views: WholeView) -> str:
        each = [sequence(cache, view, slot=0) for view in views]
        return step.mode(each, 1 << (len(views) - 1).bit_length())

    assert mode(whole) == mode(whole, whole) == "dense"
    assert mode(some[0]) == "private"
    assert mode(some[0], some[0]) == "shared"
    assert mode(some[0], some[1]) == "private"
    assert mode(some[0], whole) == "zeroed"
    assert mode(*some) == "zeroed"
    assert mode(some[1], some[2], some[1]) == "private"
    assert step.mode([sequence(cache, some[0], [4, 5, 6])], 4) == "shared"


def test_slim_ids_are_written_anew_and_given_out_again(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.float16)
    single = decoder_of(tiny_directory("llama"), torch.float32)
    run = steps_of(decoder, 2)
    sets = [random_set(decoder, 44) for _ in range(4)]
    views = [run.view(own) for own in sets[:2]]

    def check(experts: Sequence[SlimSpec]) -> None:
        for most_private in (0.0, 1.0):
            run.step.private_up_to = dict.fromkeys(run.step.private_up_to, most_private)
            caches = [run.prefilled(prompt) for prompt in PROMPTS[:2]]
            got = run.launch(run.drawn([5, 6], caches, views), caches)
            pool = single.new_pool(100)
            tokens = [
                StepTokens(
                    cache=prefilled(single, prompt, pool=pool),
                    view=masked(single, own),
                    token_ids=[token],
                )
                for prompt, own, token in zip(PROMPTS[:2], experts, (5, 6), strict=True)
            ]
            close(got, torch.cat(decode_tokens(single, tokens)))

    check(sets[:2])
    views[0].slim = sets[2]
    run.slims.update(views[0])
    check([sets[2], sets[1]])
    gone = views[1].slim_id
    views[1] = run.view(sets[3])
    assert run.slims.counts[gone] == 0
    check([sets[2], sets[3]])
    held = [run.view(sets[0]) for _ in range(22)]
    assert gone in {view.slim_id for view in held}
    with pytest.raises(MemoryError, match="all 24 sets are in use"):
        run.view(sets[0])


def test_costs_are_measured_on_the_graphs_and_leaves_no_trace(
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_directory("llama"), torch.bfloat16)
    measured, fresh = (steps_of(decoder, 4) for _ in range(2))
    costs = measured.step.measure_costs()
    assert isinstance(costs, GraphCosts)
    assert set(costs.dense) == set(costs.private) == {1, 2, 4}
    assert set(costs.zeroed) == set(costs.shared) == {2, 4}
    for own in ([0.5], [0.5] * 3, [0.01, 1.0]):
        assert costs.step_s(dense=0, own=own, shared=[]) > 0
    assert steps_of(decoder, 4, graphs=False).step.measure_costs() is ASSUMED_COSTS
    experts = random_set(decoder, 44)
    made = []
    for run in (measured, fresh):
        assert not any(run.slims.counts[1 : 1 + run.slims.sets])
        caches, view = [run.prefilled(prompt) for prompt in PROMPTS], run.view(experts)
        made.append(run.launch(run.drawn([5] * 3, caches, [view] * 3), caches))
    assert torch.equal(*made)
