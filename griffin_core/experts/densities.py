"""How many experts each layer has."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_SHARE = 0.5
"""The least number of experts of a layer, as a share of what an equal distribution gives it.
Without a floor whole layers would lose their FF at low densities."""


def uniform_count(density: float, intermediate_size: int) -> int:
    """Returns the paper's K: max(1, floor(F · density))."""
    # Rounded first: 100 * 0.29 is 28.999999999999996, but the user means 29.
    return max(1, math.floor(round(intermediate_size * density, 6)))


def counts_by_score(score: Tensor, count: int) -> tuple[int, ...]:
    """Returns K of each layer such that the layers together have the experts of the highest scores.

    Args:
        score: [L, F], comparable between layers. Ties go to the lower layer.
        count: the mean number of experts of a layer. No layer has fewer than ``LEAST_SHARE`` of it.
    """
    layers, neurons = score.shape
    ranked = score.sort(dim=1, descending=True).values
    ranked[:, : max(1, math.ceil(LEAST_SHARE * count))] = torch.inf
    taken = torch.sort(ranked.flatten(), descending=True, stable=True).indices[: layers * count]
    counts: list[int] = torch.bincount(taken // neurons, minlength=layers).tolist()
    return tuple(counts)
