"""Matrix-vector products (gemv), as fast as the weights can be read.

oneDNN's products, which are used for several rows, read at half the speed for one row. The weights
are read in place, one row after the other: a CPU prefetches poorly when four rows are read at once,
or every other row (docs/LOG.md). All tensors are bfloat16 on the CPU and contiguous; sums are
float32.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import types
from torch import Tensor

from griffin_core.backends.cpu.arithmetic import activate, axpy, dot, widen_all
from griffin_core.backends.cpu.bfloat16 import at, narrow, widen
from griffin_core.backends.cpu.team import Kernel, address, team_barrier, team_rank, team_size


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x weightᵀ + bias, for x [1, in], weight [out, in] and bias [out] -> [1, out]."""
    out, inner = weight.shape
    assert x.dtype == weight.dtype, "the loop reads addresses: another type would be noise"
    y = x.new_empty((1, out))
    scratch = torch.empty(torch.get_num_threads() * inner, dtype=torch.float32)
    _linear(
        x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr(), scratch.data_ptr(), out, inner
    )
    return y


@Kernel
def _linear(a):
    bias, y, out, inner = at(a[2], types.uint16), at(a[3], types.uint16), a[5], a[6]
    rank, size = team_rank(), team_size()
    x = at(a[4] + 4 * rank * inner, types.float32)
    widen_all(at(a[0], types.uint16), x, inner)
    for row in range(out * rank // size, out * (rank + 1) // size):
        total = dot(at(a[1] + 2 * row * inner, types.uint16), x, inner)
        if a[2] != 0:
            total += widen(bias[row])
        y[row] = narrow(total)


def feedforward_row(
    x: Tensor,
    w_in: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: int,
    keep: Tensor | None = None,
) -> Tensor:
    """Runs a whole FF block for one row, dense or on copies of the experts.

    Args:
        x: [1, D].
        w_in, down, up_bias, down_bias: as in ``FFWeights``.
        activation: a code from ``activations.ACTIVATION_CODES``.
        keep: [F] bool, contiguous: the neurons to run; None for all. All rows are read
            nevertheless, since skipping every other row takes longer (docs/LOG.md).

    Returns:
        [1, D].
    """
    neurons, width = down.shape
    y = torch.empty_like(x)
    scratch = torch.empty(neurons + 2 * torch.get_num_threads() * width, dtype=torch.float32)
    _feedforward(
        x.data_ptr(),
        w_in.data_ptr(),
        down.data_ptr(),
        address(up_bias),
        address(down_bias),
        y.data_ptr(),
        scratch.data_ptr(),
        neurons,
        width,
        activation,
        w_in.shape[0],
        address(keep),
    )
    return y


@Kernel
def _feedforward(a):
    keep, chooses = at(a[11], types.uint8), a[11] != 0
    up_bias, down_bias, y = at(a[3], types.uint16), at(a[4], types.uint16), at(a[5], types.uint16)
    neurons, width, activation, gated = a[7], a[8], a[9], a[10] == 2
    rank, size = team_rank(), team_size()
    begin, end = neurons * rank // size, neurons * (rank + 1) // size
    totals = a[6] + 4 * neurons  # D values for each thread, then x for each thread
    z, of_all = at(a[6], types.float32), at(totals, types.float32)
    own = at(totals + 4 * rank * width, types.float32)
    x = at(totals + 4 * (size + rank) * width, types.float32)
    widen_all(at(a[0], types.uint16), x, width)
    for k in range(begin, end):
        first = dot(at(a[1] + 2 * k * width, types.uint16), x, width)
        if gated:
            up = dot(at(a[1] + 2 * (neurons + k) * width, types.uint16), x, width)
            z[k] = activate(first, activation) * up
        else:
            if a[3] != 0:
                first += widen(up_bias[k])
            z[k] = activate(first, activation)
    for i in range(width):
        own[i] = np.float32(0.0)
    if chooses:
        for k in range(begin, end):
            if keep[k] == 0:
                z[k] = np.float32(0.0)
    for k in range(begin, end):
        axpy(own, at(a[2] + 2 * k * width, types.uint16), z[k], width)
    team_barrier()
    for i in range(width * rank // size, width * (rank + 1) // size):
        total = widen(down_bias[i]) if a[4] != 0 else np.float32(0.0)
        for thread in range(size):
            total += of_all[thread * width + i]
        y[i] = narrow(total)
