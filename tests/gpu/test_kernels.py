"""The Triton kernels against float64: other sets, widths and lengths each time, outputs poisoned.

They also run on a CPU, slowly, in Triton's interpreter: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.backends.activations import ACTIVATION_CODES, ACTIVATIONS
from griffin_core.backends.attention import apply_rope
from griffin_core.backends.torch import TorchBackend
from griffin_core.spec.model import Activation
from griffin_core.spec.weights import FFWeights
from tests.exact import attention
from tests.gpu.devices import DEVICE, INTERPRETED, needs_triton
from tests.poison import poison

pytestmark = [pytest.mark.gpu, needs_triton]

if DEVICE is not None:
    from griffin_core.backends.cuda.activation import activate_own, activate_rows
    from griffin_core.backends.cuda.attention import attend_rows, split_plan
    from griffin_core.backends.cuda.backend import CudaFeedForward
    from griffin_core.backends.cuda.expert_rows import ExpertRows
    from griffin_core.backends.cuda.feedforward import feedforward
    from griffin_core.backends.cuda.matvec import matvec, rms_norm
    from griffin_core.backends.cuda.rotary import rotate_and_store
    from griffin_core.backends.cuda.statistic import add_sums

DTYPES = (
    [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
)  # its dot lacks bfloat16
ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative error, ‖got - exact‖ / ‖exact‖."""

SHAPES = (
    [(48, 88), (96, 331)] if INTERPRETED else [(48, 88), (576, 1536), (3072, 24576), (5120, 13824)]
)
"""D and F."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def close(got: Tensor, exact: Tensor, times: float = 1.0) -> None:
    error = (got.double() - exact).norm() / exact.norm()
    assert error <= times * ERROR[got.dtype], float(error)  # NaN is never less


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize(("tokens", "inner", "outer"), [(1, 48, 33), (3, 577, 130), (1, 3072, 257)])
def test_a_matvec(
    tokens: int, inner: int, outer: int, extra: bool, norm: bool, dtype: torch.dtype
) -> None:
    x = randn(tokens, inner, dtype=dtype)
    w = randn(outer, inner, dtype=dtype, scale=inner**-0.5)
    bias, residual = randn(outer, dtype=dtype), randn(tokens, outer, dtype=dtype)
    by = torch.rand(inner, device=DEVICE) + 0.5
    v = x.double()
    if norm:
        v = F.rms_norm(v, (inner,), by.double(), 1e-5)
    exact = v @ w.double().t()
    if extra:
        exact = exact + bias.double() + residual.double()
    got = matvec(
        x,
        w,
        bias if extra else None,
        norm=(by, 1e-5) if norm else None,
        residual=residual if extra else None,
    )
    close(got, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, residual = randn(3, 577, dtype=dtype), randn(3, 577, dtype=dtype)
    by = torch.rand(577, device=DEVICE) + 0.5
    exact = F.rms_norm(x.double(), (577,), by.double(), 1e-5)
    close(rms_norm(x, by, 1e-5), exact)
    close(rms_norm(x, by, 1e-5, residual), exact + residual.double())


def neurons(
    width: int, count: int, dtype: torch.dtype, activation: Activation, gated: bool
) -> FFWeights:
    return FFWeights(
        activation=activation,
        w_in=randn(2 if gated else 1, count, width, dtype=dtype, scale=width**-0.5),
        down=randn(count, width, dtype=dtype, scale=count**-0.5),
        up_bias=None if gated else randn(count, dtype=dtype),
        down_bias=None if gated else randn(width, dtype=dtype),
    )


def exact_output(x: Tensor, n: FFWeights, experts: Tensor | None) -> Tensor:
    """One token's, in float64 but for the activations, which every form rounds."""
    first = x.double() @ n.w_in[0].double().t()
    if n.up_bias is not None:
        first = first + n.up_bias.double()
    z = ACTIVATIONS[n.activation](first)
    if n.gated:
        z = z * (x.double() @ n.w_in[1].double().t())
    if experts is not None:
        mask = torch.zeros_like(z)
        mask[experts.long()] = 1
        z = z * mask
    y = z @ n.down.double()
    return y if n.down_bias is None else y + n.down_bias.double()


def expert_rows(sets: Sequence[Tensor | None], count: int, *, shared: bool = False) -> ExpertRows:
    """Rows on a set each, or on all neurons for None, under slim ids in random order.

    Places after the last neuron of a set hold numbers out of range, which must not be read.
    """
    given = sets[:1] if shared else sets
    order = iter((torch.randperm(len(given)) + 1).tolist())
    slim_ids = [0 if own is None else next(order) for own in given]
    indices = torch.full((1 + len(given), count), 2**30, dtype=torch.int32, device=DEVICE)
    keep = torch.zeros((1 + len(given), count), dtype=torch.uint8, device=DEVICE)
    every = torch.arange(count, dtype=torch.int32, device=DEVICE)
    for slim_id, own in ((0, every), *zip(slim_ids, given, strict=True)):
        if own is not None:
            indices[slim_id, : len(own)] = own
            keep[slim_id, own.long()] = 1
    counts = [count if own is None else len(own) for own in sets]
    return ExpertRows(
        indices=indices,
        keep=keep,
        slim_ids=torch.tensor(slim_ids * (len(sets) if shared else 1), device=DEVICE),
        counts=torch.tensor(counts, device=DEVICE),
        shared=shared,
    )


def random_set(count: int, k: int) -> Tensor:
    return torch.randperm(count)[:k].sort().values.to(DEVICE, torch.int32)


FORMS = [(1, False), (3, False), (2, True), (16, True), (17, True), (64, True)]
"""Tokens, and whether they share a set."""

BLOCKS: list[tuple[Activation, bool]] = [
    ("silu", True),
    ("gelu_tanh", True),
    ("gelu", True),
    ("relu", True),
    ("relu", False),
    ("gelu", False),
]
"""Activation, and whether the FF is gated; without a gate it has biases."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("form", "block", "shape"),
    [(form, BLOCKS[0], shape) for form in FORMS for shape in SHAPES[:2]]
    + [(form, block, SHAPES[0]) for form in (FORMS[1], FORMS[3]) for block in BLOCKS[1:]],
)
def test_experts_read_by_index_equal_the_masked_form(
    form: tuple[int, bool],
    block: tuple[Activation, bool],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    (tokens, shared), (activation, gated) = form, block
    width, count = shape
    n = neurons(width, count, dtype, activation, gated)
    x, residual = randn(tokens, width, dtype=dtype), randn(tokens, width, dtype=dtype)
    for k in (1, count // 2 | 1, count):
        sets = [random_set(count, max(1, k - i)) for i in range(1 if shared else tokens)]
        sets = sets * tokens if shared else sets
        exact = torch.stack([exact_output(row, n, own) for row, own in zip(x, sets, strict=True)])
        got = feedforward(x, n, expert_rows(sets, count, shared=shared), residual=residual)
        close(got, exact + residual.double())
        again = feedforward(x, n, expert_rows(sets, count, shared=shared), residual=residual)
        assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_all_weights_read_once_and_zeroed_equal_a_set_for_each(
    shape: tuple[int, int], block: tuple[Activation, bool], dtype: torch.dtype
) -> None:
    (width, count), (activation, gated) = shape, block
    n = neurons(width, count, dtype, activation, gated)
    x, residual = randn(5, width, dtype=dtype), randn(5, width, dtype=dtype)
    sets = [*(random_set(count, k) for k in (1, count // 2 | 1, count - 1, count)), None]
    outputs = [exact_output(row, n, own) for row, own in zip(x, sets, strict=True)]
    exact = torch.stack(outputs) + residual.double()
    ff = CudaFeedForward(TorchBackend(x.device, dtype), n, "both")
    close(ff.on_all(x, expert_rows(sets, count), None, residual), exact, 2)
    close(ff.private(x, expert_rows(sets, count), None, residual), exact)
    close(
        ff.on_all(x, None, None, None),
        torch.stack([exact_output(row, n, None) for row in x]),
        2,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_of_one_set_than_a_product_takes_run_in_several(dtype: torch.dtype) -> None:
    width, count = SHAPES[0]
    n = neurons(width, count, dtype, "silu", True)
    x, residual = randn(70, width, dtype=dtype), randn(70, width, dtype=dtype)
    own = random_set(count, 40)
    ff = CudaFeedForward(TorchBackend(x.device, dtype), n, "both")
    got = ff.shared(x, expert_rows([own] * 70, count, shared=True), None, residual)
    exact = torch.stack([exact_output(row, n, own) for row in x])
    close(got, exact + residual.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_outside_a_set_is_zero_and_not_even_read(dtype: torch.dtype) -> None:
    count = 331
    sets = [random_set(count, k) for k in (1, 40, 330)]
    h = randn(3, 2 * count, dtype=dtype)
    keep = torch.zeros((3, count), dtype=torch.bool, device=DEVICE)
    for row, own in zip(keep, sets, strict=True):
        row[own.long()] = True
    z = torch.nn.functional.silu(h[:, :count].double()) * h[:, count:].double()
    poisoned = h.masked_fill(~keep.repeat(1, 2), math.nan)
    got = activate_own(poisoned, ACTIVATION_CODES["silu"], expert_rows(sets, count), gated=True)
    close(got, z * keep)
    assert not got[~keep].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_behind_a_norm_dense_and_on_half(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    width, count = shape
    n = neurons(width, count, dtype, "silu", True)
    x, by = randn(1, width, dtype=dtype), torch.rand(width, device=DEVICE) + 0.5
    v = F.rms_norm(x.double(), (width,), by.double(), 1e-5)
    close(feedforward(x, n, None, norm=(by, 1e-5)), exact_output(v[0], n, None)[None])
    half = random_set(count, count // 2)
    got = feedforward(x, n, expert_rows([half], count), norm=(by, 1e-5))
    close(got, exact_output(v[0], n, half)[None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotates", "normed", "window", "softcap", "splits"),
    [
        (9, 3, 64, True, False, None, None, 1),
        (9, 3, 64, True, False, 70, None, 5),
        (9, 3, 64, True, True, 1, None, 2),
        (4, 4, 16, False, False, None, None, 3),
        (8, 1, 80, True, True, None, 2.0, 32),
        (2, 2, 256, True, False, 70, 2.0, 2),
        (2, 2, 256, True, True, None, None, 7),
        (32, 1, 128, True, False, None, None, 4),
    ],
)
def test_attention_over_sequences_of_many_lengths(
    heads: int,
    kv_heads: int,
    size: int,
    rotates: bool,
    normed: bool,
    window: int | None,
    softcap: float | None,
    splits: int,
    dtype: torch.dtype,
) -> None:
    """Of one new token and of several, in a pool whose other slots hold NaN."""
    runs = ((0, 1), (1, 1), (63, 3), (0, 4), (64, 1), (65, 2), (300, 1))  # cached and new tokens
    new, scale = sum(n for _, n in runs), size**-0.5
    slots = 1 + sum(cached + n + 2 for cached, n in runs)
    kv = torch.full((2, kv_heads, slots, size), math.nan, device=DEVICE).to(dtype)
    firsts: list[int] = [0] * len(runs)
    slot = 1
    for place in torch.randperm(len(runs)).tolist():
        cached, n = runs[place]
        kv[:, :, slot : slot + cached] = randn(2, kv_heads, cached, size, dtype=dtype)
        firsts[place], slot = slot, slot + cached + n + 2
    qkv = randn(new, heads + 2 * kv_heads, size, dtype=dtype)
    rope = randn(2, new, 1, size, dtype=dtype).unbind() if rotates else None
    by = torch.rand(2, size, device=DEVICE) + 0.5
    columns = [
        (first, cached, cached + place)
        for first, (cached, n) in zip(firsts, runs, strict=True)
        for place in range(n)
    ]
    first_slots, cached_tokens, positions = torch.tensor(columns, device=DEVICE).t().contiguous()
    before = kv.double()
    got = attend_rows(
        qkv,
        heads,
        rope,
        (by[0], by[1], 1e-6) if normed else None,
        kv,
        first_slots,
        cached_tokens,
        positions,
        window=window,
        scale=scale,
        softcap=softcap,
        plan=replace(split_plan(new, heads, kv_heads, size, 1), splits=splits),
    )
    written = before.isnan()
    for row, (first, _, position) in enumerate(columns):
        q, k, v = qkv[row : row + 1].double().split([heads, kv_heads, kv_heads], dim=1)
        if normed:
            q = F.rms_norm(q, (size,), by[0].double(), 1e-6)
            k = F.rms_norm(k, (size,), by[1].double(), 1e-6)
        if rope is not None:
            q, k = q.clone(), k.clone()
            factors = rope[0][row : row + 1].double(), rope[1][row : row + 1].double()
            apply_rope(q, factors)
            apply_rope(k, factors)
        at = first + position
        close(kv[0, :, at], k[0])
        assert torch.equal(kv[1, :, at], qkv[row, heads + kv_heads :])
        written[:, :, at] = False
        before[0, :, at], before[1, :, at] = k[0], v[0]
        keys, values = before[:, :, first : at + 1].unbind()
        close(got[row], attention(q[0], keys, values, scale, window, softcap), times=1.5)
    assert torch.equal(kv.isnan(), written)  # nothing else was stored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "neurons"), [(1, 88), (3, 1025), (70, 2050)])
def test_activations_and_the_statistic_of_them(
    tokens: int, neurons: int, activation: Activation, gated: bool, dtype: torch.dtype
) -> None:
    h = randn(tokens, neurons * (2 if gated else 1), dtype=dtype)
    if tokens > 2:
        h[1] = 0.0  # a token that fires nothing
        h[2] = 200.0  # one whose squares float16 cannot add up
    exact = ACTIVATIONS[activation](h[:, :neurons].double())
    if gated:
        exact = exact * h[:, neurons:].double()
    z, squares = activate_rows(h, ACTIVATION_CODES[activation], gated=gated)
    close(z, exact)
    rows = z.double().square()
    torch.testing.assert_close(squares.sum(dim=1).double(), rows.sum(dim=1), rtol=1e-4, atol=0.0)
    norms = rows.sum(dim=1, keepdim=True)
    weighed = torch.where(norms > 0, rows / norms, 0.0)
    sums = torch.stack([weighed, rows, z.double()])
    before = torch.rand(2, 3, 3, neurons, device=DEVICE)
    for bounds in ((0, tokens), (0, tokens // 3, tokens)):  # one prompt, and two; one may be empty
        after = before.clone()
        table = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        add_sums(after[: len(bounds) - 1, :, 1], z, squares, table)
        for run, (begin, end) in enumerate(pairwise(bounds)):
            exact = before[run, :, 1] + sums[:, begin:end].sum(dim=1)
            torch.testing.assert_close(after[run, :, 1].double(), exact, rtol=1e-4, atol=1e-4)
        assert torch.equal(after[:, :, ::2], before[:, :, ::2])  # the layers beside it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "lengths"),
    [(4, 2, 16, (5,)), (6, 3, 96, (1, 7, 3)), (32, 8, 128, (2, 4))],
)
def test_keys_and_values_of_prompts_go_where_they_belong(
    heads: int,
    kv_heads: int,
    size: int,
    lengths: tuple[int, ...],
    rotates: bool,
    dtype: torch.dtype,
) -> None:
    """In the KV slots that are named, rotated as by the plain form; padding goes nowhere."""
    tokens, padding = sum(lengths), 2
    qkv = randn(tokens + padding, heads + 2 * kv_heads, size, dtype=dtype)
    by = tuple(randn(tokens + padding, 1, size, dtype=dtype) for _ in range(2))
    exact = qkv.double()
    if rotates:
        turned = exact[:, : heads + kv_heads].clone()
        apply_rope(turned, (by[0].double(), by[1].double()))
        exact[:, : heads + kv_heads] = turned
    kv = torch.full((2, kv_heads, 40, size), torch.nan, dtype=dtype, device=DEVICE)
    firsts = [25 - 11 * n for n in range(len(lengths))]
    slots = [
        first + n for first, length in zip(firsts, lengths, strict=True) for n in range(length)
    ]
    places = torch.tensor([*slots, *[-1] * padding], dtype=torch.int64, device=DEVICE)
    values = qkv[:, heads + kv_heads :].clone()
    rotate_and_store(qkv, heads, by if rotates else None, kv, places)
    close(qkv, exact)
    assert torch.equal(qkv[:, heads + kv_heads :], values)
    stored = qkv[:tokens, heads:].view(tokens, 2, kv_heads, size).permute(1, 2, 0, 3)
    assert torch.equal(kv[:, :, slots], stored)
    others = [slot for slot in range(40) if slot not in slots]
    assert kv[:, :, others].isnan().all()
