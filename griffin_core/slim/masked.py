"""The reference: the dense FF with all but the experts' activations set to zero. Saves nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_core.model.decoder import Layer
from griffin_core.model.linear import Rows
from griffin_core.slim.base import SlimFF


class Masked:
    """Runs all neurons and keeps what the experts say."""

    copies = True

    def build(self, layer: Layer, experts: Tensor, rows: Rows) -> SlimFF:
        if experts.shape[0] == layer.neurons.count:
            return layer.ff
        down = layer.neurons.down
        mask = torch.zeros(down.shape[0], dtype=down.dtype, device=down.device)
        mask[experts.long().to(mask.device)] = 1
        return lambda x: layer.ff.output(layer.ff.activations(x) * mask)

    def build_all(self, layers: Sequence[Layer], experts: Tensor) -> list[SlimFF] | None:
        return None

    def rewrite(self, blocks: Sequence[SlimFF], experts: Tensor) -> bool:
        return False

    def planned_bytes(self, layer: Layer, k: int) -> int:
        down = layer.neurons.down
        return 0 if k == down.shape[0] else down.shape[0] * down.element_size()
