"""The statistics of a layer's activations, which are read once and never copied to float32."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from griffin_core.backends.cpu.bfloat16 import at, widen
from griffin_core.backends.cpu.team import FAST, Kernel, team_barrier, team_rank, team_size

_TINY = np.float32(torch.finfo(torch.float32).tiny)


def sums_of_rows(z: Tensor) -> Tensor:
    """See ``experts.statistic.sums_of``; z [T, F] bfloat16 on the CPU."""
    z = z.contiguous()
    tokens, neurons = z.shape
    by_thread = torch.empty((torch.get_num_threads(), 3, neurons), dtype=torch.float32)
    sums = torch.empty((3, neurons), dtype=torch.float32)
    _sums(z.data_ptr(), by_thread.data_ptr(), sums.data_ptr(), tokens, neurons)
    return sums


@Kernel
def _sums(a):
    tokens, neurons = a[3], a[4]
    rank, size = team_rank(), team_size()
    own = a[1] + 12 * rank * neurons
    relative, squares, values = (
        at(own, types.float32),
        at(own + 4 * neurons, types.float32),
        at(own + 8 * neurons, types.float32),
    )
    for i in range(neurons):
        relative[i] = np.float32(0.0)
        squares[i] = np.float32(0.0)
        values[i] = np.float32(0.0)
    for token in range(tokens * rank // size, tokens * (rank + 1) // size):
        row = at(a[0] + 2 * token * neurons, types.uint16)
        square = _square(row, neurons)
        weight = np.float32(1.0) / square if square >= _TINY else np.float32(0.0)
        _add(relative, squares, values, row, weight, neurons)
    team_barrier()
    of_all, sums = at(a[1], types.float32), at(a[2], types.float32)
    width = 3 * neurons
    for i in range(width * rank // size, width * (rank + 1) // size):
        total = np.float32(0.0)
        for thread in range(size):
            total += of_all[thread * width + i]
        sums[i] = total


@njit(fastmath=FAST)
def _square(row, size):
    total = np.float32(0.0)
    for i in range(size):
        total += widen(row[i]) * widen(row[i])
    return total


@njit(fastmath=FAST)
def _add(relative, squares, values, row, weight, size):
    for i in range(size):
        value = widen(row[i])
        relative[i] += value * value * weight
        squares[i] += value * value
        values[i] += value
