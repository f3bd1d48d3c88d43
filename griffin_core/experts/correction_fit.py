"""Fits what stands in for the neurons that are not experts.

The FF's output is linear in its activations Z, so what a slim FF lacks is the output of the neurons
left out, y = Z_out W_out. From the prompt, which runs dense, come two estimates of it:

* bias: its mean over the prompt, W_out applied to the neurons' mean activations;
* residual: a linear map of the FF's input of rank r, fitted to the last tokens of the prompt by
  ridge regression along the principal directions of y, and the mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from griffin_core.experts.correction import Correction, CorrectionParams
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics
from griffin_core.spec.calibration import PRIOR_TOKENS, Calibration
from griffin_core.spec.choices import CorrectionKind

BIAS_TOKENS = 48
"""The least number of tokens for a bias. With 16 tokens it did harm (6 % more KL), with 48 it
gained 3 %, with 384 10 %."""

RESIDUAL_TOKENS = 128
"""The least number of tokens for a residual; with 48 tokens it gained little more than a bias."""

FITTED_TOKENS = 384
"""The most tokens, the last of the prompt, that a residual is fitted to. With 128 it gains about a
quarter less, with 256 a twentieth (docs/LOG.md)."""

RIDGE = 1.0
"""The ridge penalty, as a share of the number of tokens. Each input counts in units of its own
standard deviation. From 0.3 to 3 it hardly matters; below, 384 tokens are too few for D values
(docs/LOG.md)."""

SWEEPS = 2
"""The number of power iterations that find the principal directions."""

SMALLEST = 1e-12
"""Divisors are at least this."""

LOST = 2e-6
"""Squared lengths below this share of their sum are rounding errors."""

LEAST_DEVIATION = 1e-2
"""An input whose standard deviation is below this share of the mean of all is not scaled up any
further: it may be constant but for rounding."""


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The inputs and activations of a layer's FF at the last tokens of a prompt.

    Args:
        x: [n, D], the normalized input, n <= ``FITTED_TOKENS``.
        z: [n, F].
    """

    x: Tensor
    z: Tensor


def kind_for(params: CorrectionParams, tokens: int, *, prior: bool) -> CorrectionKind:
    """Returns the correction that so many tokens of a prompt can be given.

    Args:
        prior: whether the mean of few tokens is held by a prior.
    """
    if params.kind == "none" or (tokens < BIAS_TOKENS and not prior):
        return "none"
    return "residual" if params.kind == "residual" and tokens >= RESIDUAL_TOKENS else "bias"


def with_bias(
    slim: SlimSpec, statistics: Statistics, down: list[Tensor], calibration: Calibration | None
) -> SlimSpec:
    """Returns the same experts with the mean output of the other neurons as their bias.

    Args:
        down: W_down of each layer, [F, D], neuron-major.
        calibration: its prior counts as ``PRIOR_TOKENS`` tokens; None for the prompt's mean alone.
    """
    if calibration is None:
        means = statistics.values / statistics.tokens
    else:
        sums = statistics.values + PRIOR_TOKENS * calibration.means.to(statistics.values.device)
        means = sums / (statistics.tokens + PRIOR_TOKENS)
    means = means.masked_fill(slim.mask(means.device), 0.0)
    bias = [mean.to(w.dtype) @ w for mean, w in zip(means, down, strict=True)]
    return replace(slim, correction=Correction(bias=torch.stack(bias)))


def with_residual(slim: SlimSpec, tails: list[Tail], down: list[Tensor], rank: int) -> SlimSpec:
    """Returns the same experts with a residual of the other neurons.

    Args:
        tails: of each layer.
        down: W_down of each layer, [F, D], neuron-major.
        rank: r; less if there are fewer tokens or values.
    """
    lacking = []
    for tail, experts, w in zip(tails, others(slim), down, strict=True):
        lacking.append(tail.z[:, experts] @ w[experts])
    x = torch.stack([tail.x for tail in tails]).float()
    y = torch.stack(lacking).float()
    bias, into, out = fit(x, y, min(rank, *x.shape[1:]))
    dtype = down[0].dtype
    return replace(
        slim,
        correction=Correction(bias=bias.to(dtype), into=into.to(dtype), out=out.to(dtype)),
    )


def others(slim: SlimSpec) -> list[Tensor]:
    """Returns the neurons of each layer that are not experts, ascending int64."""
    return [(~row).nonzero().flatten() for row in slim.mask()]


def fit(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fits y ≈ b + (x Aᵀ) B in every layer: the rows of B are the first ``rank`` principal
    directions of y, and A is the ridge regression of y along them.

    Args:
        x: [L, n, D] float32.
        y: [L, n, D] float32.

    Returns:
        b [L, D], A [L, r, D], B [L, r, D]. Not finite if x or y are not, or are too large.
    """
    x_mean, y_mean = x.mean(dim=1, keepdim=True), y.mean(dim=1, keepdim=True)
    x, y = x - x_mean, y - y_mean
    deviation = x.square().mean(dim=1, keepdim=True).sqrt()
    least = (LEAST_DEVIATION * deviation.mean(dim=2, keepdim=True)).clamp(min=SMALLEST)
    deviation = deviation.maximum(least)
    x = x / deviation
    directions = principal_directions(y, rank)
    gram = x @ x.mT  # [L, n, n], smaller than the covariance [L, D, D] of long rows
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE * x.shape[1])
    factor = torch.linalg.cholesky_ex(gram).L
    into = torch.cholesky_solve(y @ directions, factor).mT @ x / deviation
    bias = y_mean - (x_mean @ into.mT) @ directions.mT
    return bias[:, 0], into, directions.mT.contiguous()


def principal_directions(y: Tensor, rank: int) -> Tensor:
    """Returns the first eigenvectors of yᵀy for y [L, n, D], as columns [L, D, r], by power
    iteration from random directions, which are the same in every call."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn((y.shape[2], rank), generator=generator).to(y.device)
    for _ in range(SWEEPS):
        # One side after the other: the product of both would lose directions of 2 % in rounding.
        columns = _orthonormal(y.mT @ _orthonormal(y @ columns))
    return columns


def _orthonormal(columns: Tensor) -> Tensor:
    """Returns an orthonormal basis of columns [L, n, r], by Cholesky's factor of their products.
    Twice, since the first basis is inexact where columns are nearly dependent; directions that are
    lost in rounding become arbitrary ones."""
    for _ in range(2):
        products = columns.mT @ columns
        diagonal = products.diagonal(dim1=1, dim2=2)
        diagonal.add_((LOST * diagonal.sum(dim=1, keepdim=True)).clamp(min=SMALLEST))
        factor = torch.linalg.cholesky_ex(products).L
        columns = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    return columns
