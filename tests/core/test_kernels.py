"""The compiled loops against float64, on shapes that divide by nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.backends.cpu.attention import attend_rows, cache_table
from griffin_core.backends.cpu.norm import rms_norm
from griffin_core.backends.cpu.rows import ACTIVATION_CODES, feedforward_row, linear_row
from griffin_core.backends.cpu.statistic import s2_rows
from griffin_core.backends.cpu.team import runs_kernels
from griffin_core.model.attention import rotate
from griffin_core.model.feedforward import ACTIVATIONS
from griffin_core.model.load import load_model
from tests.exact import attention
from tests.tiny import MODELS

pytestmark = pytest.mark.skipif(
    not runs_kernels(torch.bfloat16, torch.device("cpu")),
    reason="torch's threads are not libgomp's",
)

ROUNDING = 2**-8
"""Of one bfloat16 result; sums are float32."""


def weight(*shape: int) -> Tensor:
    return (torch.randn(*shape) * shape[-1] ** -0.5).bfloat16()


def close(got: Tensor, exact: Tensor) -> None:
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=ROUNDING, atol=1e-4)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    request.addfinalizer(lambda: torch.set_num_threads(before))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (331, 77), (1000, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_row(shape: tuple[int, int], bias: bool) -> None:
    w, x = weight(*shape), torch.randn(1, shape[1]).bfloat16()
    b = torch.randn(shape[0]).bfloat16() if bias else None
    close(linear_row(x, w, b), F.linear(x.double(), w.double(), None if b is None else b.double()))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("activation", ACTIVATION_CODES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("neurons", [1, 67, 300])
def test_a_feedforward_row(activation: str, gated: bool, neurons: int) -> None:
    width = 45
    x, w_in, down = (
        torch.randn(1, width).bfloat16(),
        weight(1 + gated, neurons, width),
        weight(neurons, width),
    )
    up_bias = None if gated else torch.randn(neurons).bfloat16()
    down_bias = torch.randn(width).bfloat16()
    act = ACTIVATIONS[activation]  # type: ignore[index]
    up = F.linear(x.double(), w_in[-1].double(), None if up_bias is None else up_bias.double())
    z = act(F.linear(x.double(), w_in[0].double())) * up if gated else act(up)
    exact = z @ down.double() + down_bias.double()
    got = feedforward_row(x, w_in, down, up_bias, down_bias, ACTIVATION_CODES[activation])
    close(got, exact)


@pytest.mark.parametrize("activation", ACTIVATION_CODES)
@pytest.mark.parametrize("x", [-1e30, -100.0, -20.0, 0.0, 20.0, 100.0])
def test_activations_far_out(activation: str, x: float) -> None:
    one = torch.ones(1, 1).bfloat16()
    got = feedforward_row(
        torch.tensor([[x]]).bfloat16(), one[None], one, None, None, ACTIVATION_CODES[activation]
    )
    exact = ACTIVATIONS[activation](torch.tensor([[x]]).bfloat16().double())  # type: ignore[index]
    torch.testing.assert_close(got.double(), exact, rtol=ROUNDING, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0039062, 3.3895e38])
def test_results_are_rounded_as_torch_rounds(value: float) -> None:
    x = torch.tensor([[value]])
    exact = x.bfloat16()
    one = torch.ones(1, 1).bfloat16()
    torch.testing.assert_close(linear_row(exact, one, None), exact, equal_nan=True)
    a, b = torch.tensor([[1.0, 2**-8]]).bfloat16(), torch.tensor([[1.0, 1.0]]).bfloat16()
    assert linear_row(a, b, None).item() == 1.0  # a tie goes to the even neighbour


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 7, 200])
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(9, 3, 64), (2, 1, 34), (4, 4, 16), (4, 1, 256), (2, 2, 32), (3, 1, 96)],
)
def test_attention_over_caches_of_many_lengths(
    heads: int, kv_heads: int, size: int, rotates: bool, window: int | None, softcap: float | None
) -> None:
    lengths = (0, 1, 6, 127, 128, 300)
    rows, scale = len(lengths), size**-0.5
    caches = [torch.full((2, kv_heads, n + 3, size), math.nan).bfloat16() for n in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        cache[:, :, :length] = torch.randn(2, kv_heads, length, size).bfloat16()
    qkv = torch.randn(rows, heads + 2 * kv_heads, size).bfloat16()
    rotation = torch.randn(2, rows, 1, size).bfloat16().unbind() if rotates else None
    table = cache_table([([c.data_ptr()], n, n + 3) for c, n in zip(caches, lengths, strict=True)])
    before = [cache.double() for cache in caches]
    got = attend_rows(qkv, heads, rotation, table, 0, window=window, scale=scale, softcap=softcap)
    for row, length in enumerate(lengths):
        q, k, v = qkv[row : row + 1].double().split([heads, kv_heads, kv_heads], dim=1)
        if rotation is not None:
            by = rotation[0][row : row + 1].double(), rotation[1][row : row + 1].double()
            rotate(q, by)
            rotate(k, by)
        close(caches[row][0, :, length], k[0])
        close(caches[row][1, :, length], v[0])
        assert caches[row][:, :, length + 1 :].isnan().all()
        keys, values = before[row][:, :, : length + 1].unbind()
        keys[:, length], values[:, length] = caches[row][0, :, length].double(), v[0]
        exact = attention(q[0], keys, values, scale, window, softcap)
        close(got[row], exact)


def test_scratch_does_not_follow_the_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops write float32, whatever a program that embeds them has as its default."""
    made: list[Tensor] = []
    empty = torch.empty

    def noted(*shape: object, **named: object) -> Tensor:
        made.append(empty(*shape, **named))
        return made[-1]

    monkeypatch.setattr(torch, "empty", noted)
    x, w = torch.randn(1, 8).bfloat16(), weight(8, 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        linear_row(x, w, None)
        feedforward_row(x, w[None], w, None, None, 0)
        s2_rows(x)
        held = weight(2, 1, 4, 8)
        table = cache_table([([held.data_ptr()], 1, 4)])
        qkv = weight(1, 3, 8)
        attend_rows(qkv, 1, None, table, 0, window=None, scale=1.0, softcap=None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(made) == 5
    assert {each.dtype for each in made} == {torch.float32}


@pytest.mark.parametrize("shape", [(1, 1), (7, 577), (3, 4, 64)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape).bfloat16(), torch.randn(shape[-1:])
    close(rms_norm(x, w, 1e-5), F.rms_norm(x.double(), shape[-1:], w.double(), 1e-5))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (3, 67), (37, 300)])
def test_the_statistic(tokens: int, neurons: int) -> None:
    z = torch.randn(tokens, neurons).bfloat16()
    z[tokens // 2] = 0
    rows = z.double()
    norms = rows.norm(dim=1, keepdim=True)
    exact = (rows / norms.where(norms > 0, 1.0)).square().sum(dim=0)
    torch.testing.assert_close(s2_rows(z).double(), exact, rtol=1e-5, atol=1e-9)
    assert torch.equal(s2_rows(torch.cat((z, z), dim=1)[:, :neurons]), s2_rows(z))


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_step_in_bfloat16_gives_what_a_prefill_does(
    name: str, tiny_directory: Callable[[str], object]
) -> None:
    """The same tokens one at a time, through the kernels, and at once, through torch. Compared with
    the same model in float32, one is as close as the other."""

    def hidden(dtype: torch.dtype, at_once: int) -> Tensor:
        decoder = load_model(str(tiny_directory(name)), dtype=dtype).decoder
        cache, rows = decoder.new_cache(24), []
        for start in range(0, 24, at_once):
            ids = torch.arange(10 + start, 10 + start + at_once)
            x, batch = decoder.begin(ids, [(cache, at_once)])
            for index, layer in enumerate(decoder.layers):
                x = decoder.layer(index, x, batch, layer.ff)
            cache.advance(at_once)
            rows.append(decoder.head(decoder.final_hidden(x)))
        return torch.cat(rows).double()

    exact = hidden(torch.float32, 24)
    steps, prefill = (hidden(torch.bfloat16, n) for n in (1, 24))
    assert (steps - exact).norm() < 1.5 * (prefill - exact).norm()
