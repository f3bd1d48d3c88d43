"""The interfaces of slim views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from griffin_core.backends.base import Layout, RunFF
from griffin_core.backends.batch import RowTable
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.model.weights import Layer


class RunView(Protocol):
    """What a session's FF runs on: a slim view of its experts; all weights, with activations zeroed
    outside its set; or all neurons."""

    @property
    def slim_id(self) -> int:
        """Its id in the engine's ``SlimTable``. Sessions with the same id share every product."""
        ...

    @property
    def slim(self) -> SlimSpec | None:
        """Its experts; None for all neurons."""
        ...


class BlockView(RunView, Protocol):
    """A view that has an FF block for each layer."""

    @property
    def layers(self) -> Sequence[RunFF]:
        """The block of each layer, [T, D] -> [T, D]."""
        ...


class SlimForm(Protocol):
    """A way of building FF blocks on experts: copies of their weights, or masks over all weights.

    Blocks take memory and time to build. Until a session's blocks are built, and whenever they
    would not pay, it runs on all weights, zeroed outside its set (``slim.zeroed``). One object
    serves all sessions and layers and holds no state for any of them.
    """

    def build(self, layer: Layer, experts: Tensor, layout: Layout) -> RunFF:
        """Builds the layer's FF block on ``experts`` [K], ascending int32 on any device. For all
        neurons it returns the layer's own dense block.

        Args:
            layout: the number of rows that the block is laid out for.
        """
        ...

    def planned_bytes(self, layer: Layer, k: int) -> int:
        """Returns the most bytes that ``build`` holds beyond the model's own weights for K = k. It
        is known before any expert is chosen."""
        ...


class SlimTable(Protocol):
    """The table of slim ids of one engine. Id 0 stands for all neurons; other ids are assigned by
    ``add`` and freed with the view."""

    def add(self, view: BlockView) -> int:
        """Assigns a slim id to a view, for as long as the view lives.

        Raises:
            MemoryError: the table has no place for another set.
        """
        ...

    def update(self, view: BlockView) -> None:
        """Takes over the changed experts of a view from the next step on."""
        ...

    @property
    def max_rank(self) -> int | None:
        """The highest rank of a view's correction; None for no limit."""
        ...

    def set_bytes(self, counts: Sequence[int]) -> int:
        """Returns the bytes that a set of K experts of each layer takes in the table."""
        ...

    def run(self, rows: RowTable) -> Callable[[int], RunFF]:
        """Returns the FF blocks of a step by layer, in which each row runs on the view of its slim
        id.

        Args:
            rows: the rows of the step; those of one kind of view are adjacent, see ``order``.
        """
        ...

    def order(self, slim_id: int) -> tuple[int, int]:
        """Returns the sort key of the rows of an id: sorted by it, rows of one kind are
        adjacent."""
        ...
