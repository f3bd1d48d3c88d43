"""Residuals: the fit is a ridge regression along principal directions, and nothing breaks it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from griffin_core.errors import InvalidRequest
from griffin_core.experts.correction import (
    NO_CORRECTION,
    Correction,
    CorrectionParams,
    LayerCorrection,
    correction_params,
)
from griffin_core.experts.correction_fit import RIDGE, Tail, fit, principal_directions
from griffin_core.experts.selection import Selection
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics
from griffin_core.forward.correction import corrected
from griffin_core.forward.prefill import launch
from griffin_core.forward.prompt import Part, Prompt
from griffin_core.model.load import Model

GENERATOR = torch.Generator().manual_seed(8)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def predicted(x: torch.Tensor, y: torch.Tensor, rank: int) -> torch.Tensor:
    bias, into, out = fit(x, y, rank)
    made: torch.Tensor = bias[:, None] + (x @ into.mT) @ out
    return made


def test_at_full_rank_it_is_the_ridge_regression_of_standardized_inputs() -> None:
    x, y = 3 * randn(2, 50, 12) + 5, randn(2, 50, 12)
    made = predicted(x, y, 12).double()
    x, y = x.double(), y.double()
    for layer in range(2):
        mean, deviation = x[layer].mean(dim=0), x[layer].std(dim=0, correction=0)
        unit = (x[layer] - mean) / deviation
        ridged = unit.mT @ unit + RIDGE * 50 * torch.eye(12).double()
        weights = torch.linalg.solve(ridged, unit.mT @ (y[layer] - y[layer].mean(dim=0)))
        torch.testing.assert_close(
            made[layer], y[layer].mean(dim=0) + unit @ weights, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_directions_hold_nearly_as_much_as_the_best_ones(rank: int) -> None:
    y = randn(4, 90, 30) * torch.logspace(0, -2, 30)
    found = principal_directions(y, rank)
    torch.testing.assert_close(
        found.mT @ found, torch.eye(rank).expand(4, -1, -1), rtol=0, atol=1e-4
    )
    held = (y @ found).square().sum(dim=(1, 2))
    best = torch.linalg.svdvals(y)[:, :rank].square().sum(dim=1)
    assert (held > 0.8 * best).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, y: y.zero_(),  # all neurons are experts
        lambda x, y: x.zero_(),
        lambda x, y: (x.fill_(1e4), y.fill_(-3.0)),  # the same token again and again
        lambda x, y: y.copy_(y[:, :, :1] * torch.ones(12)),  # of rank one
        lambda x, y: y[:, :, 0].mul_(1e6),
        lambda x, y: (x.mul_(1e-12), y.mul_(1e-12)),
        lambda x, y: (x.mul_(1e9), y.mul_(1e9)),
        lambda x, y: x[:, :, 3].fill_(7.0).add_(1e-6 * randn(2, 40)),  # constant but for rounding
    ],
)
def test_degenerate_prompts_give_finite_corrections_no_worse_than_the_mean(
    spoil: object,
) -> None:
    x, y = randn(2, 40, 12), randn(2, 40, 12)
    spoil(x, y)  # type: ignore[operator]
    made = predicted(x, y, 8)
    assert made.isfinite().all()
    mean = (y - y.mean(dim=1, keepdim=True)).square().sum()
    assert (y - made).square().sum() <= mean * 1.01 + 1e-6 * y.square().sum() + 1e-12
    # Nor may an input that the prompt never changed have a large say later.
    bias, into, out = fit(x, y, 8)
    later = bias + ((x[:, -1:] + 0.1 * x.abs().mean()) @ into.mT @ out)[:, 0]
    assert later.abs().max() <= 100 * (y.abs().max() + 1e-12)


def test_a_set_with_a_correction_has_another_digest() -> None:
    plain = SlimSpec(
        intermediate_size=4, counts=(1, 2), experts=torch.tensor([3, 0, 1], dtype=torch.int32)
    )
    bias = Correction(bias=torch.ones(2, 5))
    other = Correction(bias=torch.ones(2, 5), into=torch.ones(2, 1, 5), out=torch.ones(2, 1, 5))
    specs = [
        SlimSpec(intermediate_size=4, counts=(1, 2), experts=plain.experts, correction=each)
        for each in (None, bias, Correction(bias=2 * torch.ones(2, 5)), other)
    ]
    assert len({each.digest for each in specs}) == 4
    assert specs[0].digest == plain.digest
    assert (bias.nbytes, other.nbytes, other.rank) == (40, 120, 1)
    assert other.layer(1).equals(
        LayerCorrection(bias=torch.ones(5), into=torch.ones(1, 5), out=torch.ones(1, 5))
    )
    assert not other.layer(1).equals(bias.layer(1))


def test_corrections_of_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one of A and B"):
        Correction(bias=torch.ones(2, 5), into=torch.ones(2, 1, 5))
    with pytest.raises(ValueError, match=r"allowed: \[2, r, 5\]"):
        Correction(bias=torch.ones(2, 5), into=torch.ones(2, 1, 5), out=torch.ones(2, 2, 5))
    with pytest.raises(ValueError, match="different rank"):
        Correction.of_layers(
            [
                LayerCorrection(bias=torch.ones(5)),
                LayerCorrection(bias=torch.ones(5), into=torch.ones(1, 5), out=torch.ones(1, 5)),
            ]
        )


def test_what_a_request_leaves_out_comes_from_the_default() -> None:
    residual = CorrectionParams(kind="residual", rank=32)
    assert correction_params(residual, None, None) == residual
    assert correction_params(residual, None, 16).rank == 16
    assert correction_params(residual, "bias", None) == CorrectionParams(kind="bias")
    assert correction_params(NO_CORRECTION, "residual", None).rank == 64
    assert correction_params(residual, "residual", None).rank == 32
    for kind, rank in (("bias", 4), ("none", 1), ("residual", 0), ("residual", 257)):
        with pytest.raises(InvalidRequest, match="correction_rank"):
            correction_params(NO_CORRECTION, kind, rank)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="correction: got more; allowed: none, bias"):
        CorrectionParams(kind="more")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_residual_of_a_prompt_that_is_not_finite_becomes_a_bias_or_nothing(
    value: float, tiny: Callable[[str], Model]
) -> None:
    decoder = tiny("llama").decoder
    selection = Selection(density=0.5, correction=CorrectionParams(kind="residual", rank=8))
    ids = [(7 * n + n * n) % 250 for n in range(140)]
    prompt = Prompt(decoder, ids, selection)
    (read,) = launch(decoder, [Part(prompt=prompt, tokens=140)]).end()
    assert corrected(decoder, read.slim, read.statistics, selection, read.tails).correction
    for of in ("x", "z"):
        tails = [[Tail(x=each.x.clone(), z=each.z.clone()) for each in part] for part in read.tails]
        getattr(tails[0][1], of)[7] = value
        fitted = corrected(decoder, read.slim, read.statistics, selection, tails)
        assert fitted.correction is not None and fitted.correction.is_finite
    sums = read.statistics.sums.clone()
    sums[2, 0, 5:9] = torch.nan
    broken = Statistics(sums=sums, tokens=140)
    without = corrected(decoder, read.slim, broken, selection)
    assert without.correction is None or without.correction.is_finite
