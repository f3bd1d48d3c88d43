"""Small functions that are inlined into the compiled loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types

from griffin_core.backends.cpu.bfloat16 import float_of, widen
from griffin_core.backends.cpu.team import FAST

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROOT_HALF = np.float32(math.sqrt(0.5))
_ROOT_2_OVER_PI = np.float32(math.sqrt(2 / math.pi))


@njit(inline="always")
def exp(x: Any) -> Any:
    """Returns e^x in float32 with a relative error of 2e-7, in a form that LLVM vectorizes: e^x =
    2^n · e^r with |r| <= ln 2 / 2, and e^r by its series. Arguments are clipped to ±87."""
    x = min(max(x, np.float32(-87.0)), np.float32(87.0))
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    series = np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(0.5)
    series = series * r + np.float32(1.0)
    series = series * r + np.float32(1.0)
    return series * float_of((types.int32(n) + types.int32(127)) << types.int32(23))


@njit(inline="always")
def activate(x: Any, code: Any) -> Any:
    """Applies an activation, given by its code in ``ACTIVATION_CODES``, to x, float32."""
    if code == 0:
        return x / (np.float32(1.0) + exp(-x))
    if code == 1:
        return np.float32(0.5) * x * (np.float32(1.0) + math.erf(x * _ROOT_HALF))
    if code == 2:
        inner = _ROOT_2_OVER_PI * (x + np.float32(0.044715) * x * x * x)
        return x / (np.float32(1.0) + exp(np.float32(-2.0) * inner))
    return max(x, np.float32(0.0))


@njit(fastmath=FAST)
def dot(row: Any, x: Any, size: Any) -> Any:
    """Returns the dot product of a bfloat16 row and a float32 x. Memory is read fastest one row at
    a time: four rows at once ran at half the speed (docs/LOG.md)."""
    total = np.float32(0.0)
    for i in range(size):
        total += widen(row[i]) * x[i]
    return total


@njit(fastmath=FAST)
def widen_all(source: Any, target: Any, size: Any) -> None:
    """Converts bfloat16 values to float32."""
    for i in range(size):
        target[i] = widen(source[i])


@njit(fastmath=FAST)
def axpy(total: Any, row: Any, weight: Any, size: Any) -> None:
    """Adds weight · row, a bfloat16 row, to total."""
    for i in range(size):
        total[i] += widen(row[i]) * weight
