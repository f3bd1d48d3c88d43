"""Copies of the experts' rows, laid out for the library that multiplies: the form for CPUs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from griffin_core.model.decoder import Layer
from griffin_core.model.feedforward import FeedForward, feedforward_bytes
from griffin_core.model.linear import Rows
from griffin_core.slim.base import SlimFF


class Packed:
    """Builds a FeedForward that has only the experts' neurons.

    A copy cannot take other experts in place: oneDNN's layout is its own and opaque, a neuron is no
    row in it. A layer whose experts change is packed anew.
    """

    copies = True

    def build(self, layer: Layer, experts: Tensor, rows: Rows) -> SlimFF:
        if experts.shape[0] == layer.neurons.count:
            return layer.ff
        return FeedForward(layer.neurons.take(experts.to(layer.neurons.down.device)), rows)

    def build_all(self, layers: Sequence[Layer], experts: Tensor) -> list[SlimFF] | None:
        return None

    def rewrite(self, blocks: Sequence[SlimFF], experts: Tensor) -> bool:
        return False

    def planned_bytes(self, layer: Layer, k: int) -> int:
        return 0 if k == layer.neurons.count else feedforward_bytes(layer.neurons, k)
