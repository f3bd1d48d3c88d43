"""Runs each operation of a backend on given numbers, so that tests can compare backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from griffin_core.backends.base import Attention, Backend
from griffin_core.backends.batch import RowRuns, RowTable, StepBatch, StepSequence
from griffin_core.backends.torch import TorchBackend
from griffin_core.kv.cache import KvCache
from griffin_core.kv.pool import KvPool
from griffin_core.model.families.registry import spec_from_config
from griffin_core.sampling.params import SamplingParams
from griffin_core.spec.model import Activation, ModelSpec
from griffin_core.spec.weights import FFWeights, Norm
from tests.tiny import MODELS

ERROR = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
"""Largest relative error, ‖got - reference‖ / ‖reference‖, by dtype."""

SPECS = ("llama", "qwen3", "gemma2", "gemma3_text", "opt")
"""Models with grouped heads, norms of queries and keys, windows and soft caps, two kinds of rotary
positions, and none."""

D, F = 40, 67


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Makes the same numbers for every backend: normal ones, rounded to a dtype.

    Args:
        backend: what they are for; they come in its dtype and on its device.
        rounded: the dtype of the backend under test.
    """

    backend: Backend
    rounded: torch.dtype
    generator: torch.Generator

    @staticmethod
    def of(backend: Backend, rounded: torch.dtype, seed: int = 0) -> Numbers:
        generator = torch.Generator().manual_seed(seed)
        return Numbers(backend=backend, rounded=rounded, generator=generator)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """In the backend's dtype."""
        x = torch.randn(*shape, generator=self.generator) * scale
        return x.to(self.rounded).to(self.backend.device, self.backend.dtype)

    def positive(self, *shape: int) -> Tensor:
        """float32 from 0.5 to 1.5, for the weights of norms."""
        return (torch.rand(*shape, generator=self.generator) + 0.5).to(self.backend.device)

    def keep(self, *shape: int) -> Tensor:
        """Random bools."""
        return (torch.rand(*shape, generator=self.generator) < 0.5).to(self.backend.device)


Case = Callable[[Backend, Numbers], list[Tensor]]
"""Runs an operation and returns all that came of it."""


def reference(rounded: torch.dtype) -> tuple[Backend, Numbers]:
    """Plain torch in float32 on the CPU, with numbers that were rounded to a dtype."""
    backend = TorchBackend(torch.device("cpu"), torch.float32)
    return backend, Numbers.of(backend, rounded)


def check(case: Case, backend: Backend) -> None:
    """A backend's results are those of plain torch, within the tolerance of its dtype."""
    got = case(backend, Numbers.of(backend, backend.dtype))
    exact = case(*reference(backend.dtype))
    assert len(got) == len(exact)
    for place, (ours, theirs) in enumerate(zip(got, exact, strict=True)):
        close(ours, theirs, backend.dtype, place)


def close(got: Tensor, exact: Tensor, dtype: torch.dtype, place: object = None) -> None:
    """Within the tolerance of a dtype. NaN is close to nothing."""
    assert got.shape == exact.shape
    difference, norm = (got.cpu().double() - exact.cpu().double()).norm(), exact.double().norm()
    assert difference <= ERROR[dtype] * norm, (place, float(difference / norm.cpu()))


# -- products and norms ------------------------------------------------------------------------


def norms(run: Backend, numbers: Numbers) -> list[Tensor]:
    made = []
    for rows in (1, 5):
        for kind in ("rms", "layer"):
            bias = numbers.positive(D) if kind == "layer" else None
            norm = Norm(kind=kind, eps=1e-5, weight=numbers.positive(D), bias=bias)
            x, residual = numbers.normal(rows, D, scale=3.0), numbers.normal(rows, D)
            made += [run.norm(x, norm), run.norm(x, norm, residual=residual)]
            wide = numbers.normal(rows, 3, D)
            made.append(run.norm(wide[:, :2], norm))  # rows that lie apart
    return made


def linear(run: Backend, numbers: Numbers) -> list[Tensor]:
    made = []
    for rows in (1, 5):
        for biased in (False, True):
            w = run.pack_linear(
                numbers.normal(F, D, scale=D**-0.5), numbers.normal(F) if biased else None
            )
            x, residual = numbers.normal(rows, D), numbers.normal(rows, F)
            before = residual.clone()
            for kind in ("rms", "layer"):
                bias = numbers.positive(D) if kind == "layer" else None
                norm = Norm(kind=kind, eps=1e-5, weight=numbers.positive(D), bias=bias)
                made += [
                    run.linear(x, w, norm=norm),
                    run.linear(x, w, norm=norm, residual=residual),
                ]
            made += [run.linear(x, w), run.linear(x, w, residual=residual)]
            assert torch.equal(residual, before)
    return made


def softcap(run: Backend, numbers: Numbers) -> list[Tensor]:
    return [run.softcap(numbers.normal(3, 50, scale=40.0).float(), 30.0)]


# -- feedforward -------------------------------------------------------------------------------


def feedforward(activation: Activation, gated: bool) -> Case:
    """All forms of an FF block: dense, its parts, on a copy of some neurons, and zeroed."""

    def case(run: Backend, numbers: Numbers) -> list[Tensor]:
        ff = run.pack_ff(
            FFWeights(
                activation=activation,
                w_in=numbers.normal(2 if gated else 1, F, D, scale=D**-0.5),
                down=numbers.normal(F, D, scale=F**-0.5),
                up_bias=None if gated else numbers.normal(F),
                down_bias=None if gated else numbers.normal(D),
            )
        )
        norm = Norm(kind="rms", eps=1e-5, weight=numbers.positive(D))
        experts = torch.arange(3, F, 2, dtype=torch.int32, device=run.device)
        made = []
        for rows in (1, 5):
            x, residual = numbers.normal(rows, D), numbers.normal(rows, D)
            keep, of_rows = numbers.keep(F), numbers.keep(rows, F)
            z, _ = ff.activations(x)
            made += [z, ff.output(z), ff.output(z, residual)]
            made += [ff(x), ff(x, norm), ff(x, norm, residual), ff(x, None, residual)]
            own = of_rows.to(run.dtype)
            made += [ff.zeroed(x, keep), ff.zeroed(x, own, norm, residual)]
            made.append(ff.zeroed(x, own[rows // 2 :], norm))  # the rows before run dense
            made += [ff.by_rows(x, own, norm, residual), ff.by_rows(x, None, norm)]
            made += [ff.gather(experts, layout)(x, norm, residual) for layout in ("gemv", "gemm")]
        return made

    return case


def statistic(run: Backend, numbers: Numbers) -> list[Tensor]:
    """Of runs of 1, 0, 40 and 3 rows, one of which fires nothing."""
    ff = run.pack_ff(
        FFWeights(
            activation="relu",
            w_in=numbers.normal(2, F, D, scale=D**-0.5),
            down=numbers.normal(F, D),
        )
    )
    x = numbers.normal(44, D)
    x[9] = 0.0
    z, squares = ff.activations(x)
    sums = numbers.positive(4, 3, 3, F)
    run.add_statistic(sums[:, :, 1], z, squares, RowRuns.of((0, 1, 1, 41, 44), run.device))
    return [sums]


# -- attention ---------------------------------------------------------------------------------

STEPS = ((0, 1), (5, 3), (1, 8), (9, 1), (12, 2), (0, 4))
"""Of each sequence of a step the tokens that are cached, and those that are new."""

LONG_STEPS = ((0, 1), (3, 30), (20, 2))
"""With more new tokens than kernels for a few take."""


def spec_of(name: str) -> ModelSpec:
    family, values = MODELS[name]
    return spec_from_config(CONFIG_MAPPING[family](**values))


def poisoned_pool(run: Backend, spec: ModelSpec, tokens: int) -> KvPool:
    """All of whose slots hold NaN."""
    pool = run.new_pool(spec, tokens)
    for layer in pool.layers:
        layer.fill_(math.nan)
    return pool


def caches_of(run: Backend, spec: ModelSpec, capacities: Sequence[int]) -> list[KvCache]:
    """Caches that lie apart in one poisoned pool."""
    pool = poisoned_pool(run, spec, 100 + sum(capacities))
    caches = []
    for capacity in capacities:
        gap = pool.allocate(3)
        caches.append(pool.allocate(capacity))
        gap.free()
        pool.allocate(2)
    return caches


def layers_of(
    spec: ModelSpec, numbers: Numbers, attention: Attention, qkv: Sequence[Tensor]
) -> list[Tensor]:
    """The output of attention in each layer."""
    norms: list[Norm | None] = [None, None]
    if spec.query_key_norm:
        weights = numbers.positive(2, spec.head_dim)
        norms = [Norm(kind="rms", eps=spec.norm_eps, weight=weight) for weight in weights]
    return [attention(layer, own.clone(), *norms) for layer, own in enumerate(qkv)]


def qkv_of(spec: ModelSpec, numbers: Numbers, rows: int) -> list[Tensor]:
    heads = spec.num_heads + 2 * spec.num_kv_heads
    return [numbers.normal(rows, heads, spec.head_dim) for _ in spec.layers]


def stored(caches: Sequence[KvCache], lengths: Sequence[int]) -> list[Tensor]:
    """Keys and values of the sequences; the slots after them must still be poisoned."""
    made = []
    for cache, length in zip(caches, lengths, strict=True):
        for layer in range(len(cache.pool.layers)):
            made.append(cache.slice(layer, 0, length).clone())
            assert cache.slice(layer, length, cache.capacity).isnan().all()
    return made


def prefill_attention(name: str) -> Case:
    """Two prompts in passes together: 9 and 4 tokens, then 3 more of each."""

    def case(run: Backend, numbers: Numbers) -> list[Tensor]:
        spec = spec_of(name)
        caches = caches_of(run, spec, (15, 10))
        made = []
        for tokens in ((9, 4), (3, 3)):
            positions = torch.cat(
                [
                    torch.arange(cache.length, cache.length + n)
                    for cache, n in zip(caches, tokens, strict=True)
                ]
            ).to(run.device)
            runs = list(zip(caches, tokens, strict=True))
            attention = run.prefill_attention(spec, runs, positions)
            same = Numbers.of(run, numbers.rounded, seed=sum(tokens))
            made += layers_of(spec, same, attention, qkv_of(spec, same, sum(tokens)))
            for cache, n in runs:
                cache.advance(n)
        return made + stored(caches, [cache.length for cache in caches])

    return case


def filled(
    run: Backend, spec: ModelSpec, numbers: Numbers, steps: Sequence[tuple[int, int]]
) -> list[KvCache]:
    """Caches with random keys and values of the cached tokens."""
    caches = caches_of(run, spec, [cached + new + 2 for cached, new in steps])
    for cache, (cached, _) in zip(caches, steps, strict=True):
        for layer in range(len(spec.layers)):
            own = numbers.normal(2, spec.num_kv_heads, cached, spec.head_dim)
            cache.slice(layer, 0, cached).copy_(own)
        cache.advance(cached)
    return caches


def rows_of(run: Backend, caches: Sequence[KvCache], new: Sequence[int]) -> RowTable:
    """A step of the next tokens of each cache."""
    sequences = tuple(
        StepSequence(first_slot=cache.first_slot, cached=cache.length, token_ids=(0,) * n)
        for cache, n in zip(caches, new, strict=True)
    )
    return RowTable.of(StepBatch(sequences=sequences), run.device)


def decode_attention(name: str, steps: Sequence[tuple[int, int]]) -> Case:
    """A step that brings other numbers of tokens to each of many sequences."""

    def case(run: Backend, numbers: Numbers) -> list[Tensor]:
        spec = spec_of(name)
        caches = filled(run, spec, numbers, steps)
        new = [n for _, n in steps]
        attention = run.decode_attention(spec, caches[0].pool, rows_of(run, caches, new))
        made = layers_of(spec, numbers, attention, qkv_of(spec, numbers, sum(new)))
        return made + stored(caches, [cached + n for cached, n in steps])

    return case


def decode_attention_by_token(name: str, steps: Sequence[tuple[int, int]]) -> Case:
    """The same tokens as in ``decode_attention``, each in a step of its own."""

    def case(run: Backend, numbers: Numbers) -> list[Tensor]:
        spec = spec_of(name)
        caches = filled(run, spec, numbers, steps)
        first = [sum(n for _, n in steps[:place]) for place in range(len(steps))]
        qkv = qkv_of(spec, numbers, sum(n for _, n in steps))
        state = numbers.generator.get_state()
        made = [torch.full_like(own[:, : spec.num_heads].flatten(1), math.nan) for own in qkv]
        for ahead in range(max(n for _, n in steps)):
            places = [place for place, (_, n) in enumerate(steps) if ahead < n]
            own = [caches[place] for place in places]
            rows = [first[place] + ahead for place in places]
            attention = run.decode_attention(spec, own[0].pool, rows_of(run, own, [1] * len(own)))
            numbers.generator.set_state(state)  # the same norms each time
            out = layers_of(spec, numbers, attention, [each[rows] for each in qkv])
            for all_rows, of_step in zip(made, out, strict=True):
                all_rows[rows] = of_step
            for cache in own:
                cache.advance(1)
        return made + stored(caches, [cached + n for cached, n in steps])

    return case


# -- sampling ----------------------------------------------------------------------------------

REQUESTS: tuple[SamplingParams, ...] = (
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(temperature=0.7, top_p=0.9, seed=4),
    SamplingParams(temperature=1.0, top_k=20, min_p=0.01, seed=5),
    SamplingParams(
        temperature=0.9,
        repetition_penalty=1.3,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={7: 2.0},
        seed=6,
    ),
)


def draws(run: Backend) -> list[list[int]]:
    """Tokens that the same requests draw in a few steps."""
    slots = run.sampler_slots(len(REQUESTS), 300)
    for slot, params in enumerate(REQUESTS):
        slots.open(slot, params, [1, 2, 3])
    generator, made = torch.Generator().manual_seed(0), []
    for step in range(8):
        order = torch.randperm(len(REQUESTS), generator=generator)
        logits = torch.randn(len(REQUESTS), 300, generator=generator) * 2
        drawn = slots.sample(
            logits.to(run.device), order.to(run.device), (order + 10 * step).to(run.device)
        )
        made += [drawn.tolist(), slots.drawn[: len(REQUESTS)].tolist()]
    return made


CASES: dict[str, Case] = {
    "norms": norms,
    "linear": linear,
    "softcap": softcap,
    "statistic": statistic,
    "ff-silu": feedforward("silu", True),
    "ff-gelu-tanh": feedforward("gelu_tanh", True),
    "ff-relu-plain": feedforward("relu", False),
    "ff-gelu-plain": feedforward("gelu", False),
    **{f"prefill-{name}": prefill_attention(name) for name in SPECS},
    **{f"decode-{name}": decode_attention(name, STEPS) for name in SPECS},
    **{f"decode-long-{name}": decode_attention(name, LONG_STEPS) for name in SPECS},
}
