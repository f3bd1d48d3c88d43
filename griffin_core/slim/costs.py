"""The cost of a step for each way to run its FF, measured at start on this device and model.

A step reads each private set once, a shared set once for all its sessions, and all weights once for
all sessions that run dense or zeroed. Counting only bytes, n private sets of density d pay while
n · d is below 1. Rows and small products have further costs that depend on the machine, so they are
measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from griffin_core.backends.base import RunFF
from griffin_core.backends.batch import RowTable, StepBatch, StepSequence
from griffin_core.experts.selection import Selection
from griffin_core.model.decoder import Decoder
from griffin_core.slim.base import SlimForm
from griffin_core.spec.weights import Norm

MOST_COPIES = 16
"""The most sessions that get copies of their own sets, whatever was measured."""

_ROWS = (1, 2, 4, 8, 16)
_BYTES = 256 << 20  # bytes of the layers that are measured: more than CPU caches hold
_CACHED = 128  # cached tokens with which the rest of a step is measured
_ROUNDS = 3

Seconds = Mapping[int, float]
"""Number of sessions -> seconds. Other numbers are interpolated and extrapolated linearly."""


Candidate = tuple[str, int]
"""The name of what is timed, and its number of sessions."""


class StepCosts(Protocol):
    """The duration of a step in seconds."""

    def step_s(
        self, *, dense: int, own: Sequence[float], shared: Sequence[tuple[float, int]]
    ) -> float:
        """Returns the seconds of a step in the cheapest way that runs each session on its set.

        Args:
            dense: the number of sessions on all neurons.
            own: the densities of sessions that each have their own set.
            shared: for each set that several sessions share, its density and their number.
        """
        ...

    def copies_pay(self, *, whole: int, own: Sequence[float]) -> bool:
        """Returns whether copies of the experts for each of ``own`` cost less than running them
        zeroed.

        Args:
            whole: the number of further sessions that run on all weights.
            own: the densities of sessions that each have their own set.
        """
        ...

    def max_copies(self, density: float) -> int:
        """Returns the most sessions of a density for which ``copies_pay`` may be true; at least
        1."""
        ...


@dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """The step costs of a backend that runs the groups of a step one after the other: a CPU.

    Args:
        rest: seconds of everything but the FF, by number of sessions.
        dense: seconds of the FF of all layers on all neurons, by number of sessions.
        half: the same on half of the neurons, one set for all sessions. Its entry for 1 is for a
            set laid out for one row.
    """

    rest: Seconds
    dense: Seconds
    half: Seconds

    def step_s(
        self, *, dense: int, own: Sequence[float], shared: Sequence[tuple[float, int]]
    ) -> float:
        """See ``StepCosts``."""
        copies = self.copies_pay(whole=dense, own=own)
        whole = dense if copies else dense + len(own)
        sessions = dense + len(own) + sum(rows for _, rows in shared)
        return (
            _at(self.rest, sessions)
            + self._whole(whole)
            + (sum(self._slim(density, 1) for density in own) if copies else 0.0)
            + sum(self._slim(density, rows) for density, rows in shared)
        )

    def copies_pay(self, *, whole: int, own: Sequence[float]) -> bool:
        """See ``StepCosts``."""
        if not own or len(own) > min(self.max_copies(density) for density in own):
            return False
        copied = sum(self._slim(density, 1) for density in own)
        return self._whole(whole) + copied <= self._whole(whole + len(own))

    def max_copies(self, density: float) -> int:
        """See ``StepCosts``."""
        one = self._slim(density, 1)
        counts = range(1, MOST_COPIES + 1)
        return max(takewhile(lambda n: n * one <= self._whole(n), counts), default=1)

    def _whole(self, sessions: int) -> float:
        return _at(self.dense, sessions) if sessions else 0.0

    def _slim(self, density: float, sessions: int) -> float:
        return _by_density(density, _at(self.half, sessions), _at(self.dense, sessions))


@dataclass(frozen=True, kw_only=True)
class GraphCosts:
    """The step costs of a backend that runs every step as one captured graph: a GPU. A step runs in
    the next larger captured size, and takes as long as a step of that size.

    Args:
        dense, zeroed: seconds by captured size.
        shared: seconds with one set for all sessions, of half of the neurons and of all neurons, by
            captured size.
        private: seconds with a set for each session, of half of the neurons and of all neurons, by
            captured size; only sizes for which private graphs were captured.
    """

    dense: Seconds
    zeroed: Seconds
    shared: Mapping[int, tuple[float, float]]
    private: Mapping[int, tuple[float, float]]

    def step_s(
        self, *, dense: int, own: Sequence[float], shared: Sequence[tuple[float, int]]
    ) -> float:
        """See ``StepCosts``. Sessions that share a set cost as much as private ones if the step has
        other sessions too."""
        densities = [*own, *(d for d, rows in shared for _ in range(rows))]
        sessions = dense + len(densities)
        size = next((size for size in sorted(self.dense) if size >= sessions), max(self.dense))
        if not densities:
            return self.dense[size]
        if len(shared) == 1 and size in self.shared and not dense and not own:
            return _by_density(shared[0][0], *self.shared[size])
        ways = [self.zeroed[size]] if size in self.zeroed else []
        if size in self.private:
            mean = (dense + sum(densities)) / sessions
            ways.append(_by_density(mean, *self.private[size]))
        return min(ways)

    def private_up_to(self, size: int) -> float:
        """Returns the largest mean density at which private sets cost no more than running zeroed,
        in a step of a captured size."""
        if size not in self.private:
            return 0.0
        if size not in self.zeroed:  # one session
            return 1.0
        half, whole = self.private[size]
        if whole <= half:
            return 1.0 if whole <= self.zeroed[size] else 0.0
        return 0.5 + 0.5 * (self.zeroed[size] - half) / (whole - half)

    def copies_pay(self, *, whole: int, own: Sequence[float]) -> bool:
        """Returns True: sets are not copied, and each step chooses how it runs."""
        return True

    def max_copies(self, density: float) -> int:
        """Returns ``MOST_COPIES``: sets are not copied."""
        return MOST_COPIES


ASSUMED_COSTS = BlockCosts(
    rest=dict.fromkeys(_ROWS, 0.5), dense=dict.fromkeys(_ROWS, 1.0), half=dict.fromkeys(_ROWS, 0.5)
)
"""Costs by bytes alone, for an FF that takes two thirds of a step."""

EVEN_COSTS = BlockCosts(rest={1: 0.5}, dense={1: 1.0}, half={1: 1.0})
"""Costs of steps that take the same time however their FF runs, so pruning gains nothing."""


@torch.inference_mode()
def measure_costs(decoder: Decoder, form: SlimForm) -> BlockCosts:
    """Times FF blocks for 1 to 16 rows, dense and on half of the neurons, over so many layers that
    weights come from memory and not from caches; and the rest of a step with ``_CACHED`` cached
    tokens."""
    spec = decoder.spec
    layers = decoder.layers[: max(1, _BYTES // max(1, decoder.layers[0].ff.weights.nbytes))]
    k = Selection(density=0.5).count(spec.intermediate_size)
    experts = torch.arange(k, dtype=torch.int32)
    dense: list[RunFF] = [layer.ff for layer in layers]
    one = [form.build(layer, experts, "gemv") for layer in layers]
    many = [form.build(layer, experts, "gemm") for layer in layers]
    candidates: dict[Candidate, Callable[[], Tensor]] = {}
    for rows in _ROWS:
        x = torch.ones((rows, spec.hidden_size), dtype=decoder.dtype, device=decoder.device)
        candidates["dense", rows] = lambda x=x: _run(dense, x)  # type: ignore[misc]
        half = one if rows == 1 else many
        candidates["half", rows] = lambda x=x, half=half: _run(half, x)  # type: ignore[misc]
        candidates["rest", rows] = _rest(decoder, rows, len(layers))
        candidates["head", rows] = lambda x=x: decoder.logits(x)  # type: ignore[misc]
    times = _seconds(candidates)
    share = len(decoder.layers) / len(layers)
    return BlockCosts(
        rest={n: share * times["rest", n] + times["head", n] for n in _ROWS},
        dense={n: share * times["dense", n] for n in _ROWS},
        half={n: share * times["half", n] for n in _ROWS},
    )


def _run(blocks: Sequence[RunFF], x: Tensor) -> Tensor:
    for block in blocks:
        y = block(x)
    return y


def _rest(decoder: Decoder, rows: int, layers: int) -> Callable[[], Tensor]:
    """Returns a function that runs some layers for several sessions without their FF."""
    pool = decoder.new_pool(rows * _CACHED)
    caches = [pool.allocate(_CACHED) for _ in range(rows)]
    for cache in caches:
        for layer in range(layers):
            cache.slice(layer, 0, _CACHED).zero_()
    sequences = tuple(
        StepSequence(first_slot=cache.first_slot, cached=_CACHED - 1, token_ids=(0,))
        for cache in caches
    )

    def run() -> Tensor:
        table = RowTable.of(StepBatch(sequences=sequences), decoder.device)
        attention = decoder.backend.decode_attention(decoder.spec, pool, table)
        x = decoder.embed(table.token_ids, table.positions)
        for layer in range(layers):
            x = decoder.layer(layer, x, attention, _no_ff)
        return x

    return run


def _no_ff(x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
    return x


def _seconds(candidates: Mapping[Candidate, Callable[[], Tensor]]) -> dict[Candidate, float]:
    """Times the candidates in turn for several rounds and returns the least time of each, so that
    other load on the machine affects all of them alike."""
    times = dict.fromkeys(candidates, float("inf"))
    for turn in range(_ROUNDS + 1):  # the first round warms up
        for name, run in candidates.items():
            clock = time.perf_counter()
            run()[0, 0].item()  # waits for a GPU
            if turn:
                times[name] = min(times[name], time.perf_counter() - clock)
    return times


def _by_density(density: float, half: float, whole: float) -> float:
    """Interpolates the seconds at a density from those at 0.5 and 1; at least a tenth of those at
    0.5."""
    return max(half + (density - 0.5) / 0.5 * (whole - half), 0.1 * half)


def _at(times: Seconds, sessions: int) -> float:
    """Returns the seconds for a number of sessions, interpolated, or extrapolated from the last
    two."""
    if sessions in times:
        return times[sessions]
    known = sorted(times)
    if len(known) == 1:
        return times[known[0]]
    high = next((n for n in known if n > sessions), known[-1])
    low = known[max(0, known.index(high) - 1)]
    share = (sessions - low) / (high - low)
    return max(0.0, times[low] + share * (times[high] - times[low]))
