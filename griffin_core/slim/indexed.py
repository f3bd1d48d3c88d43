"""Index sets into the resident weights: the form for CUDA. No weight is copied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from griffin_core.backends.cuda.expert_table import ExpertTable, IndexSets, set_bytes
from griffin_core.backends.cuda.feedforward import MAX_SHARED_TOKENS, feedforward
from griffin_core.model.decoder import Layer
from griffin_core.model.feedforward import FeedForward, Neurons
from griffin_core.model.linear import Rows
from griffin_core.slim.base import SlimFF


class IndexedFF:
    """A layer's FF block on one set: [T, D] -> [T, D]. A decode step needs only its address.

    Args:
        sets: on the weights' device.
        row: which of them.
    """

    def __init__(self, neurons: Neurons, sets: IndexSets, row: int) -> None:
        self._neurons = neurons
        self._row = row
        self.sets = sets
        self.address = sets.addresses[row]
        self.count = sets.count

    @cached_property
    def _table(self) -> ExpertTable:
        device = self.sets.indices.device
        numbers = torch.tensor([[self.address], [self.count]], device=device)
        return ExpertTable(addresses=numbers[0], counts=numbers[1], shared=True)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float32:  # for tests: the kernels are for half precision
            return FeedForward(self._neurons.take(self.sets.indices[self._row]))(x)
        parts = torch.split(x, MAX_SHARED_TOKENS)
        return torch.cat([feedforward(part, self._neurons, self._table) for part in parts])


class Indexed:
    """Builds ``IndexedFF`` blocks."""

    copies = False

    def build(self, layer: Layer, experts: Tensor, rows: Rows) -> SlimFF:
        blocks = self.build_all([layer], experts[None])
        return blocks[0]

    def build_all(self, layers: Sequence[Layer], experts: Tensor) -> list[SlimFF]:
        neurons = layers[0].neurons
        if experts.shape[1] == neurons.count:
            return [layer.ff for layer in layers]
        device = neurons.down.device
        sets = IndexSets(experts.to(device, torch.int32, non_blocking=True), neurons.count)
        return [IndexedFF(layer.neurons, sets, row) for row, layer in enumerate(layers)]

    def rewrite(self, blocks: Sequence[SlimFF], experts: Tensor) -> bool:
        first = blocks[0]
        assert isinstance(first, IndexedFF)
        first.sets.write(experts.to(first.sets.indices.device, torch.int32, non_blocking=True))
        return True

    def planned_bytes(self, layer: Layer, k: int) -> int:
        return 0 if k == layer.neurons.count else set_bytes(k, layer.neurons.count)
