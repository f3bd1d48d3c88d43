"""The statistic of a prompt's activations, which are read once and never copied to float32."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from griffin_core.backends.cpu.bfloat16 import at, widen
from griffin_core.backends.cpu.team import FAST, Kernel, team_barrier, team_rank, team_size

_TINY = np.float32(torch.finfo(torch.float32).tiny)


def s2_rows(z: Tensor) -> Tensor:
    """See ``experts.statistic.s2_of``; z [T, F] bfloat16 on the CPU."""
    z = z.contiguous()
    tokens, neurons = z.shape
    sums = torch.empty((torch.get_num_threads(), neurons), dtype=torch.float32)
    s2 = torch.empty(neurons, dtype=torch.float32)
    _s2(z.data_ptr(), sums.data_ptr(), s2.data_ptr(), tokens, neurons)
    return s2


@Kernel
def _s2(a):
    tokens, neurons = a[3], a[4]
    rank, size = team_rank(), team_size()
    own = at(a[1] + 4 * rank * neurons, types.float32)
    for i in range(neurons):
        own[i] = np.float32(0.0)
    for token in range(tokens * rank // size, tokens * (rank + 1) // size):
        row = at(a[0] + 2 * token * neurons, types.uint16)
        square = _square(row, neurons)
        if square >= _TINY:
            _add_squares(own, row, np.float32(1.0) / square, neurons)
    team_barrier()
    of_all, s2 = at(a[1], types.float32), at(a[2], types.float32)
    for i in range(neurons * rank // size, neurons * (rank + 1) // size):
        total = np.float32(0.0)
        for thread in range(size):
            total += of_all[thread * neurons + i]
        s2[i] = total


@njit(fastmath=FAST)
def _square(row, size):
    total = np.float32(0.0)
    for i in range(size):
        total += widen(row[i]) * widen(row[i])
    return total


@njit(fastmath=FAST)
def _add_squares(total, row, weight, size):
    for i in range(size):
        total[i] += widen(row[i]) * widen(row[i]) * weight
