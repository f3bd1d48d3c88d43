"""The slim ids of backends that run a step's FF blocks one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, groupby
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from griffin_core.backends.base import Backend, FeedForward, RunFF
from griffin_core.backends.batch import DENSE, RowTable
from griffin_core.experts.correction import Correction
from griffin_core.model.decoder import Decoder
from griffin_core.slim.base import BlockView
from griffin_core.slim.corrected import corrected_rows
from griffin_core.slim.zeroed import RowMasks, ZeroedLayers
from griffin_core.spec.weights import Norm

_DENSE, _ZEROED, _SLIM = range(3)
"""The kinds of views, in the order of their rows in a step."""


class BlockTable:
    """A ``SlimTable`` of views that have an FF block for each layer.

    A step reads all weights once for the rows that run dense or zeroed, and the copies of each slim
    view once for its rows.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.masks = RowMasks()
        """The masks of the rows that ran zeroed in the last step."""
        self._decoder = decoder
        self._views: WeakValueDictionary[int, BlockView] = WeakValueDictionary()
        self._numbers = count(DENSE + 1)

    def add(self, view: BlockView) -> int:
        """Assigns a slim id to a view, for as long as the view lives."""
        slim_id = next(self._numbers)
        self._views[slim_id] = view
        return slim_id

    def update(self, view: BlockView) -> None:
        """Does nothing: a view holds its own blocks."""

    @property
    def max_rank(self) -> int | None:
        """None: corrections of any rank are run."""
        return None

    def set_bytes(self, counts: Sequence[int]) -> int:
        """Returns 0: a view counts the bytes of its own blocks."""
        return 0

    def order(self, slim_id: int) -> tuple[int, int]:
        """See ``SlimTable``."""
        return self._kind(slim_id), slim_id

    def run(self, rows: RowTable) -> Callable[[int], RunFF]:
        """See ``SlimTable``."""
        assert rows.batch is not None, "blocks are run by the host"
        sequences = rows.batch.sequences
        slim_ids = [each.slim_id for each in sequences for _ in each.token_ids]
        kv_slots = [each.first_slot for each in sequences for _ in each.token_ids]
        whole = sum(self._kind(each) != _SLIM for each in slim_ids)
        groups: list[tuple[int, Callable[[int], RunFF]]] = []
        if whole:
            groups.append((whole, self._on_all(slim_ids[:whole], kv_slots[:whole])))
        for slim_id, own in groupby(slim_ids[whole:]):
            groups.append((len(list(own)), self._views[slim_id].layers.__getitem__))
        if len(groups) == 1:
            return groups[0][1]
        return partial(_grouped, self._decoder.backend, groups)

    def keeps(self, slim_ids: Sequence[int], masks: RowMasks) -> Sequence[Tensor] | None:
        """Returns for each layer the mask [n, F] of zeroed rows, 1 for activations to keep; None if
        no row runs zeroed.

        Args:
            slim_ids: the ids of the rows that run dense, then those of the n rows that run zeroed.
            masks: caches the masks for the next step of the same sessions.
        """
        views = [self._zeroed(each) for each in slim_ids if each != DENSE]
        return masks.of(views, self._decoder.dtype) if views else None

    def correction(self, slim_id: int) -> Correction | None:
        """Returns what is added for the rows of an id; None for nothing."""
        slim = None if slim_id == DENSE else self._views[slim_id].slim
        return None if slim is None else slim.correction

    def _kind(self, slim_id: int) -> int:
        if slim_id == DENSE:
            return _DENSE
        return _ZEROED if isinstance(self._views[slim_id].layers, ZeroedLayers) else _SLIM

    def _zeroed(self, slim_id: int) -> ZeroedLayers:
        layers = self._views[slim_id].layers
        assert isinstance(layers, ZeroedLayers)
        return layers

    def _on_all(self, slim_ids: Sequence[int], kv_slots: Sequence[int]) -> Callable[[int], RunFF]:
        """Returns the dense block for rows that run on all weights; those that run zeroed are at
        the end."""
        layers, dtype = self._decoder.layers, self._decoder.dtype
        dense = sum(each == DENSE for each in slim_ids)
        views = [self._zeroed(each) for each in slim_ids[dense:]]
        if not views:
            return self._decoder.dense
        if not dense and len(set(slim_ids)) == 1:
            return views[0].__getitem__
        corrections = [self.correction(each) for each in slim_ids]
        if len(set(kv_slots[dense:])) == len(views):  # sessions reserve one row of masks each
            masks = self.masks.of(views, dtype)
            return corrected_rows(
                self._decoder.backend,
                corrections,
                lambda layer: partial(_zeroed_rows, layers[layer].ff, masks[layer]),
            )

        def block(layer: int) -> RunFF:
            keep = torch.stack([view.keep[layer] for view in views]).to(dtype)
            return partial(_zeroed_rows, layers[layer].ff, keep)

        return corrected_rows(self._decoder.backend, corrections, block)


def _zeroed_rows(
    ff: FeedForward,
    keep: Tensor,
    x: Tensor,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    return ff.zeroed(x, keep, norm, residual)


def _grouped(
    backend: Backend, groups: Sequence[tuple[int, Callable[[int], RunFF]]], layer: int
) -> RunFF:
    """Returns a layer's block for the rows of several groups, each given by its number of rows."""
    sizes = [n for n, _ in groups]

    def run(x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        if norm is not None:
            x = backend.norm(x, norm)
        parts = zip(torch.split_with_sizes(x, sizes), groups, strict=True)
        y = torch.cat([block(layer)(rows) for rows, (_, block) in parts])
        return y if residual is None else y.add_(residual)

    return run
