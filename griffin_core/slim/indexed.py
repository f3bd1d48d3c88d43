"""Index sets into the resident weights: the form for CUDA. No weight is copied."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from griffin_core.cuda.expert_table import ExpertTable
from griffin_core.cuda.feedforward import MAX_SHARED_TOKENS, feedforward
from griffin_core.model.decoder import Layer
from griffin_core.model.feedforward import FeedForward, Neurons
from griffin_core.model.linear import Rows
from griffin_core.slim.base import SlimFF


class IndexedFF:
    """A layer's FF block on one set: [T, D] -> [T, D]. A decode step needs only its address.

    Args:
        experts: [K] int32 on the weights' device.
    """

    def __init__(self, neurons: Neurons, experts: Tensor) -> None:
        self._neurons = neurons
        self._experts = experts
        self.address = experts.data_ptr()
        self.count = experts.shape[0]

    @cached_property
    def _table(self) -> ExpertTable:
        numbers = torch.tensor([[self.address], [self.count]], device=self._experts.device)
        return ExpertTable(addresses=numbers[0], counts=numbers[1], shared=True)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float32:  # for tests: the kernels are for half precision
            return FeedForward(self._neurons.take(self._experts))(x)
        parts = torch.split(x, MAX_SHARED_TOKENS)
        return torch.cat([feedforward(part, self._neurons, self._table) for part in parts])


class Indexed:
    """Builds ``IndexedFF`` blocks."""

    def build(self, layer: Layer, experts: Tensor, rows: Rows) -> SlimFF:
        if experts.shape[0] == layer.neurons.count:
            return layer.ff
        device = layer.neurons.down.device
        return IndexedFF(layer.neurons, experts.to(device, torch.int32, non_blocking=True))

    def planned_bytes(self, layer: Layer, k: int) -> int:
        return 0 if k == layer.neurons.count else k * torch.int32.itemsize
