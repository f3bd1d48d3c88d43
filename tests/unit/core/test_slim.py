"""packed = masked, for every kind of FF."""

from __future__ import annotations

import pytest
import torch

from griffin_core.backends.base import Layout
from griffin_core.backends.select import backend_for
from griffin_core.model.weights import Layer
from griffin_core.slim.masked import Masked
from griffin_core.slim.packed import Packed
from griffin_core.slim.zeroed import ZeroedFF
from griffin_core.spec.model import Activation
from griffin_core.spec.weights import FFWeights, Norm

D, F = 40, 67
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random_layer(activation: Activation, *, gated: bool, bias: bool, dtype: torch.dtype) -> Layer:
    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)

    backend = backend_for(torch.device("cpu"), dtype)
    weights = FFWeights(
        activation=activation,
        w_in=weight(2 if gated else 1, F, D),
        down=weight(F, D),
        up_bias=weight(F) if bias and not gated else None,
        down_bias=weight(D) if bias else None,
    )
    norm = Norm(kind="rms", eps=1e-5, weight=None)
    unused = backend.pack_linear(weight(D, D))
    return Layer(
        qkv=unused,
        o=unused,
        ff=backend.pack_ff(weights),
        attention_norm=norm,
        ff_norm=norm,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("k", [1, 33, F])
@pytest.mark.parametrize(("layout", "tokens"), [("gemv", 1), ("gemv", 5), ("gemm", 1), ("gemm", 5)])
def test_packed_is_masked(
    activation: Activation,
    gated: bool,
    bias: bool,
    dtype: torch.dtype,
    k: int,
    layout: Layout,
    tokens: int,
) -> None:
    torch.manual_seed(0)  # what a single neuron gives may cancel to almost nothing
    layer = random_layer(activation, gated=gated, bias=bias, dtype=dtype)
    experts = torch.randperm(F)[:k].sort().values.int()
    x = torch.randn(tokens, D).to(dtype)
    packed = Packed().build(layer, experts, layout)(x)
    masked = Masked().build(layer, experts, layout)(x)
    scale = masked.float().abs().max().item()
    torch.testing.assert_close(packed, masked, atol=TOLERANCE[dtype] * scale, rtol=0)
    keep = torch.zeros(F, dtype=torch.bool).index_fill_(0, experts.long(), True)
    zeroed = ZeroedFF(layer.ff, keep)(x)
    torch.testing.assert_close(zeroed, masked, atol=TOLERANCE[dtype] * scale, rtol=0)
    beside = layer.ff.zeroed(
        torch.cat((torch.randn(2, D).to(dtype), x)), keep.expand(tokens, -1).to(dtype)
    )
    torch.testing.assert_close(beside[2:], masked, atol=TOLERANCE[dtype] * scale, rtol=0)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("k", [1, 33, F - 1])
def test_planned_bytes_are_never_less_than_the_rows_themselves(gated: bool, k: int) -> None:
    layer = random_layer("silu", gated=gated, bias=not gated, dtype=torch.float32)
    rows = layer.ff.weights.gather(torch.arange(k))
    assert Packed().planned_bytes(layer, k) >= rows.nbytes


@pytest.mark.parametrize("form", [Packed(), Masked()], ids=["packed", "masked"])
def test_all_neurons_are_the_dense_block_and_cost_nothing(form: Packed | Masked) -> None:
    layer = random_layer("silu", gated=True, bias=False, dtype=torch.float32)
    assert form.build(layer, torch.arange(F, dtype=torch.int32), "gemv") is layer.ff
    assert form.planned_bytes(layer, F) == 0


@pytest.mark.parametrize("gated", [True, False])
def test_a_row_does_not_depend_on_the_rows_beside_it(gated: bool) -> None:
    layer = random_layer("silu", gated=gated, bias=not gated, dtype=torch.float32)
    slim = Packed().build(layer, torch.arange(0, F, 2, dtype=torch.int32), "gemm")
    x = torch.randn(32, D)
    alone = torch.cat([slim(row[None]) for row in x])
    for rows in (2, 3, 7, 16, 32):
        torch.testing.assert_close(slim(x[:rows]), alone[:rows], rtol=1e-6, atol=1e-6)


def test_magnitude_is_the_row_norm_or_for_gated_ff_the_product_of_row_norms() -> None:
    plain = random_layer("relu", gated=False, bias=True, dtype=torch.float32).ff.weights
    torch.testing.assert_close(plain.magnitude(), plain.w_in[0].norm(dim=1))
    gated = random_layer("silu", gated=True, bias=False, dtype=torch.float32).ff.weights
    gate, up = gated.w_in
    torch.testing.assert_close(gated.magnitude(), up.norm(dim=1) * gate.norm(dim=1))
