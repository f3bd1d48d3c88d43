"""The statistics of a layer's activations, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
"""The smallest float32 whose reciprocal is finite."""


def statistic(z: Tensor) -> Tensor:
    """Activations Z [T, F] of any float dtype -> [3, F] float32: s2 = Σ_t Z_tf² / ‖Z_t‖², Σ_t Z_tf²
    and Σ_t Z_tf.

    Rows are read as float32, whatever the dtype of ``z`` (squares of float16 overflow). A zero row,
    which ReLU can produce, adds nothing to s2; neither does a row whose squares underflow (norm <
    1e-19). The sum of s2 over neurons is the number of all other rows. ``z`` must hold no padding,
    which would be counted.
    """
    values = z.float()
    squares = values.square()
    row = squares.sum(dim=1)
    weight = torch.where(row >= TINY, row.reciprocal(), torch.zeros_like(row))
    both = torch.stack([weight, torch.ones_like(weight)]) @ squares
    return torch.cat([both, values.sum(dim=0, keepdim=True)])
