"""What stands in for the neurons that ``sparsify`` leaves out, fitted in float64.

It shares no code with the engine's fit (``experts.correction_fit``): principal directions come from
a singular value decomposition and the ridge regression is solved for the inputs' covariance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from griffin_core.errors import InvalidRequest
from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.correction_fit import (
    BIAS_TOKENS,
    LEAST_DEVIATION,
    RESIDUAL_TOKENS,
    RIDGE,
)
from griffin_core.hf_blocks import Block, sizes
from griffin_core.hf_experts import Seen
from griffin_core.spec.calibration import PRIOR_TOKENS, Calibration


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """b + (x A) B for a layer: b [D], A [D, r] and B [r, D], or a bias alone."""

    bias: Tensor
    into: Tensor | None = None
    out: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the correction for inputs x [..., D], in their dtype."""
        added = self.bias.to(x.device, x.dtype).expand_as(x)
        if self.into is None or self.out is None:
            return added
        return added + x @ self.into.to(x.device, x.dtype) @ self.out.to(x.device, x.dtype)


def fit_layer(
    seen: Sequence[Seen],
    down: Tensor,
    experts: Tensor,
    params: CorrectionParams,
    means: Tensor | None,
    *,
    prior_counts: bool,
) -> LayerMap | None:
    """Fits a layer's correction; None if the prompts are too short for one.

    Args:
        seen: of each prompt; several prompts share the experts, and get a bias.
        down: W_down as [F, D], float64.
        experts: [K].
        means: the prior's mean activations [F]; None without a calibration.
        prior_counts: whether prompts of few tokens get a bias as well.
    """
    tokens = sum(each.tokens for each in seen)
    left_out = torch.ones(len(down), dtype=torch.bool)
    left_out[experts.long()] = False
    if params.kind == "none" or left_out.sum() == 0 or (tokens < BIAS_TOKENS and not prior_counts):
        return None
    if params.kind == "bias" or len(seen) > 1 or tokens < RESIDUAL_TOKENS:
        sums, count = torch.stack([each.values for each in seen]).sum(dim=0), tokens
        if means is not None:
            sums, count = sums + PRIOR_TOKENS * means, tokens + PRIOR_TOKENS
        return LayerMap(bias=(sums / count)[left_out] @ down[left_out])
    x, y = seen[0].x, seen[0].z[:, left_out] @ down[left_out]
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    deviation = x.std(dim=0, correction=0)
    deviation = deviation.clamp(min=LEAST_DEVIATION * float(deviation.mean()) or 1.0)
    x = x / deviation
    directions = torch.linalg.svd(y, full_matrices=False).Vh[: params.rank]
    covariance = x.mT @ x
    covariance.diagonal().add_(RIDGE * len(x))
    into = torch.linalg.solve(covariance, x.mT @ (y @ directions.mT)) / deviation[:, None]
    return LayerMap(bias=y_mean - x_mean @ into @ directions, into=into, out=directions)


def prior_means(calibration: Calibration | None, layer: int) -> Tensor | None:
    """Returns the mean activations [F] of a layer on ordinary text."""
    return None if calibration is None else calibration.means[layer].double().cpu()


def rows_of_down(block: Block) -> Tensor:
    """Returns W_down as [F, D] float64, on the CPU.

    Raises:
        InvalidRequest: it is quantized.
    """
    weight: Tensor = block.down.weight.detach()  # type: ignore[operator]
    rows = weight if isinstance(block.down, Conv1D) else weight.t()
    if not rows.is_floating_point() or tuple(rows.shape) != sizes(block.down):
        given = f"a correction, with quantized weights in {block.name}"
        raise InvalidRequest("correction", given, "none")
    return rows.double().cpu()


class AddCorrection:
    """Hooks that add a layer's correction to the output of its FF, at a completion's tokens.

    Args:
        pruned: returns which tokens of the running pass belong to a completion, [B, T] bool.
    """

    def __init__(self, layer_map: LayerMap, pruned: Callable[[], Tensor]) -> None:
        self._map = layer_map
        self._pruned = pruned
        self._x: Tensor | None = None

    def see(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A pre-hook of the first inner layer: keeps the FF's input."""
        self._x = args[0]

    def add(self, _: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """A hook of the down projection."""
        x, self._x = self._x, None
        rows = self._pruned()
        assert x is not None
        added: Tensor = self._map(x).reshape(y.shape) * rows.to(y.device).reshape(*y.shape[:-1], 1)
        return y + added
