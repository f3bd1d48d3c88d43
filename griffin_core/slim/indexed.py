"""The slim ids of the CUDA backend: expert sets as neuron indices, in tensors that captured steps
read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal
from weakref import finalize

import torch
from torch import Tensor

from griffin_core.backends.base import RunFF
from griffin_core.backends.batch import DENSE, RowTable
from griffin_core.backends.cuda.backend import CudaFeedForward
from griffin_core.backends.cuda.expert_rows import ExpertRows
from griffin_core.backends.transfers import on_device
from griffin_core.experts.selection import Selection, select_experts
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.model.decoder import Decoder
from griffin_core.slim.base import BlockView
from griffin_core.slim.correction_table import CorrectionTable
from griffin_core.spec.weights import Norm

FFMode = Literal["dense", "shared", "private", "zeroed"]
"""How the FF of a step runs. dense: on all neurons. shared: all rows on one set. private: each row
on its own set, which is fastest for few rows. zeroed: all weights are read once for all rows, and
each row's activations are zeroed outside its set, which gives the result of private at the cost of
dense."""

MODES: tuple[FFMode, ...] = ("dense", "shared", "private", "zeroed")


class IndexTable:
    """A ``SlimTable`` of sets of neuron indices; no weights are copied.

    Args:
        sets: the most sets at once, not counting the set of all neurons.
        rank: the highest rank of a set's correction. The memory for it is taken for every set.
    """

    def __init__(self, decoder: Decoder, *, sets: int, rank: int = 0) -> None:
        self._decoder = decoder
        layers, neurons = len(decoder.layers), decoder.spec.intermediate_size
        shape = (layers, sets + 2, neurons)
        device = decoder.device
        self._indices = torch.zeros(shape, dtype=torch.int32, device=device)
        self._keep = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._device_counts = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        self._corrections = CorrectionTable(decoder, sets=sets + 2, rank=rank)
        self.sets = sets
        self.padding = sets + 1
        """The slim id of padding rows: a set of one neuron, the least that a row can read."""
        self.counts = [0] * (sets + 2)
        """The number of neurons in all layers, by slim id; 0 for an unused id."""
        self._free = list(range(sets, 0, -1))
        for slim_id, k in ((DENSE, neurons), (self.padding, 1)):
            first = torch.arange(k, dtype=torch.int32, device=device).repeat(layers)
            self._write(
                slim_id, SlimSpec(intermediate_size=neurons, counts=(k,) * layers, experts=first)
            )

    @property
    def nbytes(self) -> int:
        """Size of the table on the device in bytes, allocated at start."""
        own = self._indices.nbytes + self._keep.nbytes + self._device_counts.nbytes
        return own + self._corrections.nbytes

    @property
    def max_rank(self) -> int:
        """See ``SlimTable``."""
        return self._corrections.rank

    @property
    def all_neurons(self) -> int:
        """The number of neurons in all layers."""
        return self.counts[DENSE]

    def add(self, view: BlockView) -> int:
        """See ``SlimTable``."""
        if not self._free:
            raise MemoryError(f"slim table: all {self.sets} sets are in use")
        assert view.slim is not None
        slim_id = self._free.pop()
        self._write(slim_id, view.slim)
        finalize(view, self._release, slim_id)
        return slim_id

    def update(self, view: BlockView) -> None:
        """See ``SlimTable``. The change is in stream order: steps that were launched earlier still
        read the old set."""
        assert view.slim is not None
        self._write(view.slim_id, view.slim)

    def set_bytes(self, counts: Sequence[int]) -> int:
        """See ``SlimTable``."""
        layers, _, neurons = self._indices.shape
        return 4 * sum(counts) + layers * neurons if min(counts) < neurons else 0

    def order(self, slim_id: int) -> tuple[int, int]:
        """See ``SlimTable``. Rows may be in any order."""
        return (0, 0)

    def run(self, rows: RowTable, mode: FFMode = "zeroed") -> Callable[[int], RunFF]:
        """See ``SlimTable``.

        Args:
            mode: must fit the rows: "shared" needs rows of one id, "dense" needs rows of id 0.
        """
        if mode == "dense":
            return self._decoder.dense
        counts = self._device_counts.index_select(1, rows.slim_ids)
        return partial(self._block, rows, counts, mode)

    def write_random(self, density: float, sets: int) -> None:
        """Writes random sets to the ids 1 to ``sets``, or to the last id, for measurements before
        the first view."""
        layers, _, neurons = self._indices.shape
        selection, magnitude = Selection(density=density), self._decoder.magnitudes
        for slim_id in range(1, 1 + min(sets, self.sets)):
            score = torch.rand((layers, neurons), device=self._indices.device)
            self._write(slim_id, select_experts(score, selection, magnitude=magnitude))
            self.counts[slim_id] = 0

    def _block(self, rows: RowTable, counts: Tensor, mode: FFMode, layer: int) -> RunFF:
        sets = ExpertRows(
            indices=self._indices[layer],
            keep=self._keep[layer],
            slim_ids=rows.slim_ids,
            counts=counts[layer],
            shared=mode == "shared",
            correction=self._corrections.rows(layer),
        )
        ff = self._decoder.layers[layer].ff
        assert isinstance(ff, CudaFeedForward)
        return partial(_run, ff, sets, mode)

    def _write(self, slim_id: int, slim: SlimSpec) -> None:
        device = self._indices.device
        there = slim.table.to(device, non_blocking=True)
        self._indices[:, slim_id, : there.shape[1]].copy_(there)
        self._keep[:, slim_id].zero_()
        self._keep[:, slim_id].scatter_(1, there.long(), 1)
        self._device_counts[:, slim_id].copy_(on_device(slim.counts, torch.int64, device))
        self._corrections.write(slim_id, slim.correction)
        self.counts[slim_id] = sum(slim.counts)

    def _release(self, slim_id: int) -> None:
        self.counts[slim_id] = 0
        self._free.append(slim_id)


def _run(
    ff: CudaFeedForward,
    sets: ExpertRows,
    mode: FFMode,
    x: Tensor,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    if mode == "shared":
        return ff.shared(x, sets, norm, residual)
    if mode == "private":
        return ff.private(x, sets, norm, residual)
    return ff.on_all(x, sets, norm, residual)
