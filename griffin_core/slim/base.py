"""What slim views are to the rooms that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from griffin_core.backends.base import Layout, RunFF
from griffin_core.backends.batch import RowTable
from griffin_core.experts.expert_set import ExpertSet
from griffin_core.model.weights import Layer


class RunView(Protocol):
    """What a session's FF runs on: a slim view, all weights zeroed outside its set, or all."""

    @property
    def slim_id(self) -> int:
        """Its number in the engine's ``SlimTable``. Sessions with the same number share every
        product."""
        ...

    @property
    def experts(self) -> ExpertSet | None:
        """The set; None for all neurons."""
        ...


class BlockView(RunView, Protocol):
    """A view that has an FF block for each layer."""

    @property
    def layers(self) -> Sequence[RunFF]:
        """One block a layer, [T, D] -> [T, D]."""
        ...


class SlimForm(Protocol):
    """A way of building FF blocks on experts: copies of their weights, or masks over all.

    Blocks cost memory and time to build. Sessions run on all weights, zeroed (``slim.zeroed``),
    until theirs are built and whenever they would not pay. One object serves all sessions and
    layers and holds no state of any.
    """

    def build(self, layer: Layer, experts: Tensor, layout: Layout) -> RunFF:
        """The layer's FF block on ``experts`` [K], ascending int32 on any device. All neurons give
        the layer's own dense block.

        Args:
            layout: for how many rows at once.
        """
        ...

    def planned_bytes(self, layer: Layer, k: int) -> int:
        """Most bytes that ``build`` holds beyond the model's own weights for K = k: known before
        any expert is chosen."""
        ...


class SlimTable(Protocol):
    """What the slim ids of one engine stand for. Id 0 is all neurons; other ids are given by
    ``add`` and end with the view."""

    def add(self, view: BlockView) -> int:
        """A slim id for a view, for as long as the view lives.

        Raises:
            MemoryError: there is no place for another set.
        """
        ...

    def update(self, view: BlockView) -> None:
        """The view has other experts from the next step on, as many in each layer."""
        ...

    def set_bytes(self, k: int) -> int:
        """Bytes that a set of K = k takes in the table."""
        ...

    def run(self, rows: RowTable) -> Callable[[int], RunFF]:
        """For each layer the FF block of a step, in which each row runs on what its id stands for.

        Args:
            rows: those of one kind of view side by side, see ``order``.
        """
        ...

    def order(self, slim_id: int) -> tuple[int, int]:
        """Where a step has the rows of an id: sorted by this, each kind stands side by side."""
        ...
