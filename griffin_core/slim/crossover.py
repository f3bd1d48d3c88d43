"""Up to how many sessions private expert sets pay, measured on this machine.

A step reads each private set once, and a dense FF once for all. n sessions at half density read n
halves: from two on, running all of them dense would cost less than private sets do, if only bytes
counted. How much rows and small products cost beside bytes is the machine's affair.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from griffin_core.experts.selection import Selection
from griffin_core.model.decoder import Decoder
from griffin_core.slim.base import SlimFF, SlimForm

PrivateLimit = Callable[[float], int]
"""density -> the most sessions of it that are better off with a set each; at least 1."""

_ROWS = (1, 2, 4, 8, 16)
_BYTES = 256 << 20  # measured over layers of so much together: more than caches hold
_ROUNDS = 3


def assumed_private_limit(density: float) -> int:
    """What counting bytes alone says."""
    return max(1, int(min(_ROWS[-1], 1 / density)))


@torch.inference_mode()
def measure_private_limit(decoder: Decoder, form: SlimForm) -> PrivateLimit:
    """Times the dense FF for 1 to 16 rows, and half of it for one.

    Returns:
        For a density the largest n for which n slim products of one row take no longer than a
        dense one of n rows. Between and beyond what was timed it is interpolated linearly.
    """
    layers = decoder.layers[: max(1, _BYTES // max(1, decoder.layers[0].neurons.nbytes))]
    dense = {rows: _seconds(decoder, [layer.ff for layer in layers], rows) for rows in _ROWS}
    width = decoder.spec.ff_width
    half = torch.arange(Selection(density=0.5).experts_of(width), dtype=torch.int32)
    slim = _seconds(decoder, [form.build(layer, half, "one") for layer in layers], 1)

    def limit(density: float) -> int:
        alone = max(0.0, slim + (density - 0.5) / 0.5 * (dense[1] - slim))
        pays = [n for n in range(1, _ROWS[-1] + 1) if n * alone <= _between(dense, n)]
        return max(pays, default=1)

    return limit


def _seconds(decoder: Decoder, blocks: Sequence[SlimFF], rows: int) -> float:
    x = torch.ones((rows, decoder.spec.width), dtype=decoder.dtype, device=decoder.device)
    times = []
    for _ in range(_ROUNDS + 1):  # the first warms up
        clock = time.perf_counter()
        for block in blocks:
            y = block(x)
        y[0, 0].item()  # a GPU is waited for
        times.append(time.perf_counter() - clock)
    return statistics.median(times[1:])


def _between(dense: dict[int, float], rows: int) -> float:
    low = max(r for r in dense if r <= rows)
    high = min(r for r in dense if r >= rows)
    share = (rows - low) / (high - low) if high > low else 0.0
    return dense[low] + share * (dense[high] - dense[low])
