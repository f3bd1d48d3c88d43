"""RMSNorm of a few rows in one call; torch needs ten."""

from __future__ import annotations

import numpy as np
from numba import types
from torch import Tensor

from griffin_core.backends.cpu.bfloat16 import at, float_of, narrow, widen
from griffin_core.backends.cpu.team import Kernel
from griffin_core.backends.transfers import float_bits

MAX_VALUES = 1 << 15
"""The number of values up to which one thread is as fast as several."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) · weight, for x [..., D] bfloat16, contiguous, and weight [D] float32."""
    y = x.new_empty(x.shape)
    width = x.shape[-1]
    _rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.numel() // width,
        width,
        float_bits(eps),
        threads=1,
    )
    return y


@Kernel
def _rms_norm(a):
    weight, rows, width, eps = at(a[1], types.float32), a[3], a[4], float_of(types.int32(a[5]))
    for row in range(rows):
        x = at(a[0] + 2 * row * width, types.uint16)
        y = at(a[2] + 2 * row * width, types.uint16)
        squares = np.float32(0.0)
        for i in range(width):
            squares += widen(x[i]) * widen(x[i])
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        for i in range(width):
            y[i] = narrow(widen(x[i]) * scale * weight[i])
