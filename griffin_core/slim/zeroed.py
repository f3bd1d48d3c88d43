"""The dense FF for several sessions at once, with each one's activations zeroed outside its set.

All weights are read once for all rows, so a step costs as much as a dense one, and each session
gets the same result as on a copy of its experts. Sessions run this way while copies are being
built, and where copies do not pay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from griffin_core.backends.base import FeedForward, RunFF
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.model.decoder import Decoder
from griffin_core.slim.corrected import corrected_block
from griffin_core.spec.weights import Norm


class ZeroedFF:
    """A layer's dense FF block with the activations outside one set zeroed: [T, D] -> [T, D].

    Args:
        keep: [F] bool, the neurons of the set.
    """

    def __init__(self, ff: FeedForward, keep: Tensor) -> None:
        self._ff = ff
        self._keep = keep

    def __call__(
        self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return self._ff.zeroed(x, self._keep, norm, residual)


class ZeroedLayers(Sequence[RunFF]):
    """The blocks of all layers on one expert set. They are made in microseconds, since no weights
    are copied."""

    def __init__(self, decoder: Decoder, slim: SlimSpec) -> None:
        self.keep = slim.mask(decoder.device)
        """[L, F] bool."""
        self._blocks = [
            corrected_block(decoder.backend, ZeroedFF(layer.ff, keep), slim.correction, index)
            for index, (layer, keep) in enumerate(zip(decoder.layers, self.keep, strict=True))
        ]

    def __getitem__(self, layer):  # type: ignore[no-untyped-def]  # an int or a slice
        return self._blocks[layer]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[RunFF]:
        return iter(self._blocks)


def zeroed_bytes(decoder: Decoder) -> int:
    """Returns the most bytes that a session needs to run zeroed: its ``ZeroedLayers``, and its row
    of the step's ``RowMasks``."""
    neurons = len(decoder.layers) * decoder.spec.intermediate_size
    return neurons * (torch.bool.itemsize + decoder.dtype.itemsize)


class RowMasks:
    """The masks of the activations that the rows of a step keep. They are made when the step's
    sessions change and kept for later steps, until one of these sessions no longer runs zeroed:
    their bytes are counted for these sessions."""

    def __init__(self) -> None:
        self._sessions: list[ReferenceType[ZeroedLayers]] = []
        self._masks: list[Tensor] = []

    @property
    def empty(self) -> bool:
        """Whether it holds no masks and no references to sessions."""
        return not self._masks and not self._sessions

    def of(self, sessions: Sequence[ZeroedLayers], dtype: torch.dtype) -> Sequence[Tensor]:
        """Returns a mask [N, F] for each layer, with a row for each session: 1 for activations that
        the row keeps, else 0."""
        same = len(sessions) == len(self._sessions) and all(
            one is other() for one, other in zip(sessions, self._sessions, strict=True)
        )
        if not same:
            self._drop()  # so that old and new masks are never held at the same time
            self._masks = list(torch.stack([s.keep for s in sessions], dim=1).to(dtype).unbind())
            self._sessions = [ref(session, self._drop) for session in sessions]
        return self._masks

    def _drop(self, _: object = None) -> None:
        self._sessions, self._masks = [], []
