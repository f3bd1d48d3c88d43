"""Up to how many sessions private expert sets pay, measured on this machine.

A step reads each private set once, and a dense FF once for all. n sessions at half density read n
halves: from two on, running all of them dense would cost less than private sets do, if only bytes
counted. How much rows and small products cost beside bytes is the machine's affair.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile

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
        See ``private_limit_of``.
    """
    layers = decoder.layers[: max(1, _BYTES // max(1, decoder.layers[0].neurons.nbytes))]
    dense = {rows: _seconds(decoder, [layer.ff for layer in layers], rows) for rows in _ROWS}
    width = decoder.spec.ff_width
    experts = torch.arange(Selection(density=0.5).experts_of(width), dtype=torch.int32)
    slim = _seconds(decoder, [form.build(layer, experts, "one") for layer in layers], 1)
    return private_limit_of(
        dense,
        half={rows: rows * slim for rows in _ROWS},
        whole={rows: rows * dense[1] for rows in _ROWS},
    )


def private_limit_of(
    dense: Mapping[int, float], half: Mapping[int, float], whole: Mapping[int, float]
) -> PrivateLimit:
    """What times say.

    Args:
        dense: by number of sessions, with all of them dense.
        half, whole: with a set each, of half of the neurons and of all.

    Returns:
        For a density the largest n up to which n sets take no longer than n dense sessions. Between
        and beyond what was timed it is interpolated linearly.
    """

    def limit(density: float) -> int:
        def private(n: int) -> float:
            of_half = _between(half, n)
            return of_half + (density - 0.5) / 0.5 * (_between(whole, n) - of_half)

        counts = range(1, max(dense) + 1)
        return max(takewhile(lambda n: private(n) <= _between(dense, n), counts), default=1)

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


def _between(times: Mapping[int, float], rows: int) -> float:
    low = max(r for r in times if r <= rows)
    high = min(r for r in times if r >= rows)
    share = (rows - low) / (high - low) if high > low else 0.0
    return times[low] + share * (times[high] - times[low])
