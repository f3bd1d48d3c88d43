"""packed = masked, for every kind of FF."""

from __future__ import annotations

import pytest
import torch

from griffin_core.model.feedforward import FeedForward
from griffin_core.model.spec import Activation
from griffin_core.slim.masked import Masked
from griffin_core.slim.packed import Packed

D, F = 40, 67
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random_ff(
    activation: Activation, *, gated: bool, bias: bool, dtype: torch.dtype
) -> FeedForward:
    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)

    return FeedForward(
        activation=activation,
        gate=weight(F, D) if gated else None,
        up=weight(F, D),
        down=weight(F, D),
        up_bias=weight(F) if bias else None,
        down_bias=weight(D) if bias else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("k", [1, 33, F])
def test_packed_is_masked(
    activation: Activation, gated: bool, bias: bool, dtype: torch.dtype, k: int
) -> None:
    ff = random_ff(activation, gated=gated, bias=bias, dtype=dtype)
    experts = torch.randperm(F)[:k].sort().values.int()
    x = torch.randn(5, D).to(dtype)
    packed = Packed().build(ff, experts)(x)
    masked = Masked().build(ff, experts)(x)
    scale = masked.float().abs().max().item()
    torch.testing.assert_close(packed, masked, atol=TOLERANCE[dtype] * scale, rtol=0)


@pytest.mark.parametrize("form", [Packed(), Masked()], ids=["packed", "masked"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("k", [1, 33, F])
def test_planned_bytes_are_never_less_than_what_is_held(
    form: Packed | Masked, gated: bool, k: int
) -> None:
    ff = random_ff("silu", gated=gated, bias=not gated, dtype=torch.float32)
    built = form.build(ff, torch.arange(k, dtype=torch.int32))
    assert form.planned_bytes(ff, k) >= built.nbytes


def test_all_neurons_cost_nothing() -> None:
    ff = random_ff("silu", gated=True, bias=False, dtype=torch.float32)
    assert Packed().build(ff, torch.arange(F, dtype=torch.int32)).nbytes == 0


def test_magnitude_is_the_row_norm_or_for_gated_ff_the_product_of_row_norms() -> None:
    plain = random_ff("relu", gated=False, bias=True, dtype=torch.float32)
    torch.testing.assert_close(plain.magnitude(), plain.up.norm(dim=1))
    gated = random_ff("silu", gated=True, bias=False, dtype=torch.float32)
    assert gated.gate is not None
    torch.testing.assert_close(gated.magnitude(), gated.up.norm(dim=1) * gated.gate.norm(dim=1))
