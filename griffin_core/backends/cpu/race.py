"""The race by which a token is drawn: docs/adr/0014-the-sampler.md."""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit, types

from griffin_core.backends.cpu.bfloat16 import at
from griffin_core.backends.cpu.philox import philox
from griffin_core.backends.cpu.team import FAST

BLOCK = 64
"""The number of tokens in the race at once: 16 counters of Philox, four tokens each."""

_loop = partial(
    njit, fastmath=FAST, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)()
_part = partial(njit, inline="always")()

_ALMOST_ONE = np.float32(1 - 2.0**-24)
_UNIT = np.float32(2.0**-32)


@_loop
def race(w, padded, min_p, seed, position, scratch):
    """Returns the token with the smallest key among those of weight min_p or more; the first among
    equals."""
    v = at(scratch, types.float32)
    k0, k1 = types.uint32(seed), types.uint32(seed >> 32)
    c1, c2 = types.uint32(position), types.uint32(position >> 32)
    least = max(min_p, np.float32(1e-45))
    best, token = np.float32(np.inf), types.int64(-1)
    for begin in range(0, padded, BLOCK):
        kept = types.int32(0)
        for i in range(BLOCK):
            kept |= types.int32(w[begin + i] >= least)
        if kept == 0:
            continue
        for g in range(BLOCK // 4):
            counter = types.uint32(begin // 4 + g)
            r0, r1, r2, r3 = philox(counter, c1, c2, types.uint32(0), k0, k1)
            v[4 * g] = _unit(r0)
            v[4 * g + 1] = _unit(r1)
            v[4 * g + 2] = _unit(r2)
            v[4 * g + 3] = _unit(r3)
        # -log(1 - v) >= v, so a token that does not beat the best without the logarithm cannot beat
        # it.
        faster = types.int32(0)
        for i in range(BLOCK):
            faster |= types.int32(v[i] < best * w[begin + i])
        if faster == 0:
            continue
        for i in range(BLOCK):
            if w[begin + i] >= least:
                key = _exponential(v[i]) / w[begin + i]
                if key < best:
                    best, token = key, types.int64(begin + i)
    return token


@_part
def _unit(bits):
    return min((types.float32(bits) + np.float32(0.5)) * _UNIT, _ALMOST_ONE)


@_part
def _exponential(v):
    """Returns -log(1 - v), from its series where 1 - v would lose digits."""
    if v < np.float32(1 / 64):
        third = np.float32(1 / 3)
        series = v * (np.float32(0.5) + v * (third + v * np.float32(0.25)))
        return v * (np.float32(1.0) + series)
    return -np.log(np.float32(1.0) - v)
