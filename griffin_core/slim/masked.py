"""The reference form: the dense FF with all activations but the experts' set to zero. It saves no
work."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from griffin_core.backends.base import Layout, RunFF
from griffin_core.model.weights import Layer


class Masked:
    """Runs all neurons and keeps the activations of the experts."""

    def build(self, layer: Layer, experts: Tensor, layout: Layout) -> RunFF:
        if experts.shape[0] == layer.ff.weights.count:
            return layer.ff
        down = layer.ff.weights.down
        keep = torch.zeros((1, down.shape[0]), dtype=down.dtype, device=down.device)
        keep[:, experts.long().to(keep.device)] = 1
        return partial(_masked, layer, keep)

    def planned_bytes(self, layer: Layer, k: int) -> int:
        down = layer.ff.weights.down
        return 0 if k == down.shape[0] else down.shape[0] * down.element_size()


def _masked(
    layer: Layer, keep: Tensor, x: Tensor, norm: object = None, residual: Tensor | None = None
) -> Tensor:
    return layer.ff.zeroed(x, keep.expand(x.shape[0], -1), norm, residual)  # type: ignore[arg-type]
