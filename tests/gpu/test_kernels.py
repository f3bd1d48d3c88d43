"""The Triton kernels against float64: other sets, widths and lengths each time, outputs poisoned.

They also run on a CPU, slowly, in Triton's interpreter: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.backends.cpu.rows import ACTIVATION_CODES
from griffin_core.model.attention import rotate
from griffin_core.model.feedforward import ACTIVATIONS, FeedForward, Neurons
from griffin_core.spec.model import Activation
from tests.exact import attention
from tests.gpu.devices import DEVICE, INTERPRETED, needs_triton

pytestmark = [pytest.mark.gpu, needs_triton]

if DEVICE is not None:
    from griffin_core.backends.cuda.activation import activate_own, activate_rows
    from griffin_core.backends.cuda.attention import DeviceCaches, attend_caches, plan
    from griffin_core.backends.cuda.expert_table import ExpertTable, IndexSets
    from griffin_core.backends.cuda.feedforward import feedforward, feedforward_on_all
    from griffin_core.backends.cuda.matvec import matvec, rms_norm
    from griffin_core.backends.cuda.rotary import Places, rotate_and_store, rotate_rows
    from griffin_core.backends.cuda.statistic import add_s2_columns

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
    """Whatever a kernel does not write is NaN."""
    made: Callable[..., Tensor] = torch.empty
    like, of = torch.empty_like, Tensor.new_empty

    def fill(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(made(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: fill(of(*a, **k)))


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
) -> Neurons:
    return Neurons(
        activation=activation,
        w_in=randn(2 if gated else 1, count, width, dtype=dtype, scale=width**-0.5),
        down=randn(count, width, dtype=dtype, scale=count**-0.5),
        up_bias=None if gated else randn(count, dtype=dtype),
        down_bias=None if gated else randn(width, dtype=dtype),
    )


def exact_output(x: Tensor, n: Neurons, experts: Tensor | None) -> Tensor:
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


def table(sets: list[Tensor], shared: bool) -> ExpertTable:
    return ExpertTable(
        addresses=torch.tensor([s.data_ptr() for s in sets], device=DEVICE),
        counts=torch.tensor([s.numel() for s in sets], device=DEVICE),
        shared=shared,
    )


def random_set(count: int, k: int) -> Tensor:
    """Followed by numbers out of range, which must not be read as neurons."""
    chosen = torch.randperm(count)[:k].sort().values
    return torch.cat((chosen, torch.full((64,), 2**30))).to(DEVICE, torch.int32)[:k]


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
        got = feedforward(x, n, table(sets, shared), residual=residual)
        close(got, exact + residual.double())
        assert torch.equal(got, feedforward(x, n, table(sets, shared), residual=residual))


def index_sets(count: int, ks: list[int]) -> list[IndexSets]:
    """Random sets of so many neurons."""
    return [IndexSets(random_set(count, k)[None], count) for k in ks]


def table_of(sets: list[IndexSets]) -> ExpertTable:
    return ExpertTable(
        addresses=torch.tensor([s.addresses[0] for s in sets], device=DEVICE),
        counts=torch.tensor([s.count for s in sets], device=DEVICE),
        shared=False,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_all_weights_read_once_and_zeroed_equal_a_set_for_each(
    shape: tuple[int, int], block: tuple[Activation, bool], dtype: torch.dtype
) -> None:
    (width, count), (activation, gated) = shape, block
    n = neurons(width, count, dtype, activation, gated)
    x = randn(4, width, dtype=dtype)
    sets = index_sets(count, [1, count // 2 | 1, count - 1, count])
    exact = [exact_output(row, n, own.indices[0]) for row, own in zip(x, sets, strict=True)]
    ff = FeedForward(n)
    close(feedforward_on_all(x, ff, n, table_of(sets)), torch.stack(exact), 2)
    close(feedforward(x, n, table_of(sets)), torch.stack(exact))
    close(
        feedforward_on_all(x, ff, n, None),
        torch.stack([exact_output(row, n, None) for row in x]),
        2,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_outside_a_set_is_zero_and_not_even_read(dtype: torch.dtype) -> None:
    count = 331
    sets = index_sets(count, [1, 40, 330])
    h = randn(3, 2 * count, dtype=dtype)
    keep = torch.cat([own.keep for own in sets]).bool()
    z = torch.nn.functional.silu(h[:, :count].double()) * h[:, count:].double()
    poisoned = h.masked_fill(~keep.repeat(1, 2), math.nan)
    got = activate_own(poisoned, ACTIVATION_CODES["silu"], table_of(sets), gated=True)
    close(got, z * keep)
    assert not got[~keep].any()


def test_a_set_is_rewritten_in_place() -> None:
    """[N, K] numbers, then for each set a byte for each neuron."""
    first = torch.tensor([[0, 2], [1, 4]], dtype=torch.int32, device=DEVICE)
    sets = IndexSets(first, 5)
    assert sets.keep.tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]]
    addresses = list(sets.addresses)
    sets.write(torch.tensor([[3, 4], [0, 1]], dtype=torch.int32, device=DEVICE))
    assert sets.indices.tolist() == [[3, 4], [0, 1]]
    assert sets.keep.tolist() == [[0, 0, 0, 1, 1], [1, 1, 0, 0, 0]]
    assert sets.addresses == addresses == [row.data_ptr() for row in sets.indices]


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
    got = feedforward(x, n, table([half], False), norm=(by, 1e-5))
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
def test_attention_over_caches_of_many_lengths(
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
    lengths = (0, 1, 63, 64, 65, 300)
    rows, scale = len(lengths), size**-0.5
    caches = [
        torch.full((2, kv_heads, n + 3, size), math.nan, device=DEVICE).to(dtype) for n in lengths
    ]
    for cache, length in zip(caches, lengths, strict=True):
        cache[:, :, :length] = randn(2, kv_heads, length, size, dtype=dtype)
    qkv = randn(rows, heads + 2 * kv_heads, size, dtype=dtype)
    rotation = randn(2, rows, 1, size, dtype=dtype).unbind() if rotates else None
    by = torch.rand(2, size, device=DEVICE) + 0.5
    device_caches = DeviceCaches(
        addresses=torch.tensor([[c.data_ptr() for c in caches]], device=DEVICE),
        starts=torch.tensor(lengths, device=DEVICE),
        capacities=torch.tensor([n + 3 for n in lengths], device=DEVICE),
    )
    before = [cache.double() for cache in caches]
    got = attend_caches(
        qkv,
        heads,
        rotation,
        (by[0], by[1], 1e-6) if normed else None,
        device_caches,
        0,
        window=window,
        scale=scale,
        softcap=softcap,
        how=replace(plan(rows, heads, kv_heads, size, 1), splits=splits),
    )
    for row, length in enumerate(lengths):
        q, k, v = qkv[row : row + 1].double().split([heads, kv_heads, kv_heads], dim=1)
        if normed:
            q = F.rms_norm(q, (size,), by[0].double(), 1e-6)
            k = F.rms_norm(k, (size,), by[1].double(), 1e-6)
        if rotation is not None:
            q, k = q.clone(), k.clone()
            factors = rotation[0][row : row + 1].double(), rotation[1][row : row + 1].double()
            rotate(q, factors)
            rotate(k, factors)
        close(caches[row][0, :, length], k[0])
        assert torch.equal(caches[row][1, :, length], qkv[row, heads + kv_heads :])
        assert caches[row][:, :, length + 1 :].isnan().all()
        keys, values = before[row][:, :, : length + 1].unbind()
        keys[:, length], values[:, length] = k[0], v[0]
        exact = attention(q[0], keys, values, scale, window, softcap)
        close(got[row], exact, times=1.5)


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
    before = torch.rand(2, 3, neurons, device=DEVICE)
    for bounds in ((0, tokens), (0, tokens // 3, tokens)):  # one prompt, and two; one may be empty
        after = before.clone()
        table = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        add_s2_columns(after[: len(bounds) - 1, 1], z, squares, table)
        for run, (begin, end) in enumerate(pairwise(bounds)):
            exact = before[run, 1] + weighed[begin:end].sum(dim=0)
            torch.testing.assert_close(after[run, 1].double(), exact, rtol=1e-4, atol=1e-6)
        assert torch.equal(after[:, ::2], before[:, ::2])  # the layers beside it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [(3, 16), (13, 96), (40, 128)])
def test_rotary_positions(heads: int, size: int, dtype: torch.dtype) -> None:
    """On some heads of a row, in place; the others stay."""
    qkv = randn(5, heads + 2, size, dtype=dtype)
    cos, sin = (randn(5, 1, size, dtype=dtype) for _ in range(2))
    exact = qkv.double()
    exact[:, :heads] = (
        exact[:, :heads] * cos.double() + exact[:, :heads].roll(size // 2, -1) * sin.double()
    )
    rotate_rows(qkv[:, :heads], cos, sin)
    close(qkv, exact)


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
    """After what each cache holds, rotated as by the plain form; padding goes nowhere."""
    tokens, padding = sum(lengths), 2
    qkv = randn(tokens + padding, heads + 2 * kv_heads, size, dtype=dtype)
    by = tuple(randn(tokens + padding, 1, size, dtype=dtype) for _ in range(2))
    exact = qkv.double()
    if rotates:
        turned = exact[:, : heads + kv_heads].clone()
        rotate(turned, (by[0].double(), by[1].double()))
        exact[:, : heads + kv_heads] = turned
    caches = [
        [torch.full((2, kv_heads, 20 + n, size), torch.nan, dtype=dtype, device=DEVICE)] * 2
        for n in range(len(lengths))
    ]
    starts = [3 * n for n in range(len(lengths))]
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]

    def on_device(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=DEVICE)

    places = Places(
        addresses=on_device([[cache[layer].data_ptr() for cache in caches] for layer in range(2)]),
        capacities=on_device([cache[0].shape[2] for cache in caches]),
        starts=on_device(starts),
        bounds=on_device(bounds),
    )
    values = qkv[:, heads + kv_heads :].clone()
    rotate_and_store(qkv, heads, by if rotates else None, places, 1)
    close(qkv, exact)
    assert torch.equal(qkv[:, heads + kv_heads :], values)
    for n, length in enumerate(lengths):
        cache, rows = caches[n][1], qkv[bounds[n] : bounds[n + 1], heads:]
        there = cache[:, :, starts[n] : starts[n] + length]
        assert torch.equal(there, rows.view(length, 2, kv_heads, size).permute(1, 2, 0, 3))
        assert cache[:, :, : starts[n]].isnan().all()
        assert cache[:, :, starts[n] + length :].isnan().all()
