"""Copies of the experts' rows, laid out by the backend: the form for CPUs."""

from __future__ import annotations

from torch import Tensor

from griffin_core.backends.base import Layout, RunFF
from griffin_core.model.weights import Layer


class Packed:
    """Builds FF blocks that hold only the experts' neurons.

    A copy cannot be changed in place: oneDNN's layout is opaque, and a neuron is not a row in it.
    If the experts of a layer change, the layer is packed again.
    """

    def build(self, layer: Layer, experts: Tensor, layout: Layout) -> RunFF:
        if experts.shape[0] == layer.ff.weights.count:
            return layer.ff
        return layer.ff.gather(experts, layout)

    def planned_bytes(self, layer: Layer, k: int) -> int:
        return 0 if k == layer.ff.weights.count else layer.ff.gathered_bytes(k)
