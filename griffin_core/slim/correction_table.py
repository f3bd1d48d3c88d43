"""The corrections of expert sets by slim id, in tensors that captured steps read."""

from __future__ import annotations

import torch

from griffin_core.backends.cuda.expert_rows import CorrectionRows
from griffin_core.experts.correction import Correction
from griffin_core.model.decoder import Decoder


class CorrectionTable:
    """The corrections of all sets of an ``IndexTable``; zero for a set that has none.

    Args:
        sets: the number of slim ids.
        rank: the highest rank of a residual; lower ones are filled up with zeros.
    """

    def __init__(self, decoder: Decoder, *, sets: int, rank: int) -> None:
        layers, width = len(decoder.layers), decoder.spec.hidden_size
        self.rank = rank
        place = {"dtype": decoder.dtype, "device": decoder.device}
        self._bias = torch.zeros((layers, sets, width), **place)  # type: ignore[call-overload]
        shape = (layers, sets, rank, width)
        self._into = torch.zeros(shape, **place)  # type: ignore[call-overload]
        self._out = torch.zeros(shape, **place)  # type: ignore[call-overload]

    @property
    def nbytes(self) -> int:
        """Size on the device in bytes."""
        size: int = self._bias.nbytes + self._into.nbytes + self._out.nbytes
        return size

    def write(self, slim_id: int, correction: Correction | None) -> None:
        """Sets the correction of an id. Steps that were launched earlier still read the old one."""
        if correction is None:
            self._bias[:, slim_id].zero_()
        else:
            self._bias[:, slim_id].copy_(correction.bias)
        if not self.rank:
            return
        for table, values in (
            (self._into, None if correction is None else correction.into),
            (self._out, None if correction is None else correction.out),
        ):
            rank = 0 if values is None else values.shape[1]
            if values is not None:
                table[:, slim_id, :rank].copy_(values)
            table[:, slim_id, rank:].zero_()

    def rows(self, layer: int) -> CorrectionRows:
        """Returns the corrections of all ids in one layer, as kernels read them."""
        return CorrectionRows(bias=self._bias[layer], into=self._into[layer], out=self._out[layer])
