"""FF blocks with the corrections of the rows that run on experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from griffin_core.backends.base import Backend, RunFF
from griffin_core.experts.correction import Correction, LayerCorrection
from griffin_core.spec.weights import Norm


class CorrectedFF:
    """A layer's FF block on one expert set, and its correction: [T, D] -> [T, D].

    Args:
        ff: the block on the experts: a copy of them, or all weights with masked activations.
    """

    def __init__(self, backend: Backend, ff: RunFF, correction: LayerCorrection) -> None:
        self.ff = ff
        self._backend = backend
        self._correction = correction

    def __call__(
        self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if norm is not None:
            x = self._backend.norm(x, norm)
        return self._correction.add(self.ff(x, None, residual), x)


def plain_block(ff: RunFF) -> RunFF:
    """Returns a block without its correction."""
    return ff.ff if isinstance(ff, CorrectedFF) else ff


def corrected_block(
    backend: Backend, ff: RunFF, correction: Correction | None, layer: int
) -> RunFF:
    """Returns a layer's block with its correction, if there is one."""
    return ff if correction is None else CorrectedFF(backend, ff, correction.layer(layer))


def corrected_rows(
    backend: Backend, corrections: Sequence[Correction | None], block: Callable[[int], RunFF]
) -> Callable[[int], RunFF]:
    """Returns the blocks of a step with the correction of each row.

    Args:
        corrections: for each of the N rows; None for rows that have none.
        block: returns a layer's block for all rows.
    """
    corrected = [(row, own) for row, own in enumerate(corrections) if own is not None]
    if not corrected:
        return block
    index = torch.tensor([row for row, _ in corrected], device=backend.device)

    def of_layer(layer: int) -> RunFF:
        ff = block(layer)

        def run(x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
            if norm is not None:
                x = backend.norm(x, norm)
            y = ff(x, None, residual)
            for row, own in corrected:
                of_row = own.layer(layer)
                if of_row.into is not None:
                    of_row.add_map(y[row : row + 1], x[row : row + 1])
            return y.index_add_(0, index, torch.stack([own.bias[layer] for _, own in corrected]))

        return run

    return of_layer
