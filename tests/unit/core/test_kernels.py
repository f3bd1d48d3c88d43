"""The compiled loops against float64, on shapes that divide by nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.backends.activations import ACTIVATION_CODES, ACTIVATIONS
from griffin_core.backends.attention import apply_rope
from griffin_core.backends.cpu.attention import attend_rows
from griffin_core.backends.cpu.norm import rms_norm
from griffin_core.backends.cpu.rows import feedforward_row, gemv
from griffin_core.backends.cpu.statistic import sums_of_rows
from griffin_core.backends.cpu.team import runs_kernels
from griffin_core.forward.decode import StepTokens, decode_tokens
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
    close(gemv(x, w, b), F.linear(x.double(), w.double(), None if b is None else b.double()))


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
    torch.testing.assert_close(gemv(exact, one, None), exact, equal_nan=True)
    a, b = torch.tensor([[1.0, 2**-8]]).bfloat16(), torch.tensor([[1.0, 1.0]]).bfloat16()
    assert gemv(a, b, None).item() == 1.0  # a tie goes to the even neighbour


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 7, 200])
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(9, 3, 64), (2, 1, 34), (4, 4, 16), (4, 1, 256), (2, 2, 32), (3, 1, 96)],
)
def test_attention_over_sequences_of_many_lengths(
    heads: int, kv_heads: int, size: int, rotates: bool, window: int | None, softcap: float | None
) -> None:
    runs = ((0, 1), (1, 1), (6, 3), (127, 1), (128, 2), (300, 1))  # tokens cached, and new ones
    scale = size**-0.5
    new = sum(n for _, n in runs)
    slots = 1 + sum(cached + n + 2 for cached, n in runs)
    kv = torch.full((2, kv_heads, slots, size), math.nan).bfloat16()
    firsts, rows_of, slot, row = [], [], 1, 0
    for cached, n in runs:
        kv[:, :, slot : slot + cached] = torch.randn(2, kv_heads, cached, size).bfloat16()
        firsts.append(slot)
        rows_of.append(range(row, row + n))
        slot, row = slot + cached + n + 2, row + n
    qkv = torch.randn(new, heads + 2 * kv_heads, size).bfloat16()
    rope = torch.randn(2, new, 1, size).bfloat16().unbind() if rotates else None
    first_slots = [first for first, (_, n) in zip(firsts, runs, strict=True) for _ in range(n)]
    positions = [cached + place for cached, n in runs for place in range(n)]
    before = kv.double()
    got = attend_rows(
        qkv,
        heads,
        rope,
        kv,
        torch.tensor(first_slots),
        torch.tensor(positions),
        window=window,
        scale=scale,
        softcap=softcap,
    )
    for first, (cached, n), rows in zip(firsts, runs, rows_of, strict=True):
        end = cached + n
        keys, values = before[:, :, first : first + end].unbind()
        for row, position in zip(rows, range(cached, end), strict=True):
            q, k, v = qkv[row : row + 1].double().split([heads, kv_heads, kv_heads], dim=1)
            if rope is not None:
                by = rope[0][row : row + 1].double(), rope[1][row : row + 1].double()
                apply_rope(q, by)
                apply_rope(k, by)
            close(kv[0, :, first + position], k[0])
            close(kv[1, :, first + position], v[0])
            keys[:, position], values[:, position] = kv[0, :, first + position].double(), v[0]
            seen = slice(0, position + 1)
            exact = attention(q[0], keys[:, seen], values[:, seen], scale, window, softcap)
            close(got[row], exact)
        assert kv[:, :, first + end : first + end + 2].isnan().all()


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
        gemv(x, w, None)
        feedforward_row(x, w[None], w, None, None, 0)
        sums_of_rows(x)
        held = weight(2, 1, 4, 8)
        qkv, zero = weight(1, 3, 8), torch.zeros(1, dtype=torch.int64)
        attend_rows(qkv, 1, None, held, zero, zero + 1, window=None, scale=1.0, softcap=None)
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
def test_the_statistics(tokens: int, neurons: int) -> None:
    z = torch.randn(tokens, neurons).bfloat16()
    z[tokens // 2] = 0
    rows = z.double()
    norms = rows.norm(dim=1, keepdim=True)
    s2 = (rows / norms.where(norms > 0, 1.0)).square().sum(dim=0)
    exact = torch.stack([s2, rows.square().sum(dim=0), rows.sum(dim=0)])
    torch.testing.assert_close(sums_of_rows(z).double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(sums_of_rows(torch.cat((z, z), dim=1)[:, :neurons]), sums_of_rows(z))


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
            ids = range(10 + start, 10 + start + at_once)
            view = [layer.ff for layer in decoder.layers]
            rows += decode_tokens(decoder, [StepTokens(cache=cache, view=view, token_ids=ids)])
        return torch.cat(rows).double()

    exact = hidden(torch.float32, 24)
    steps, few, prefill = (hidden(torch.bfloat16, n) for n in (1, 6, 24))
    assert (steps - exact).norm() < 1.5 * (prefill - exact).norm()
    assert (few - exact).norm() < 1.5 * (prefill - exact).norm()
