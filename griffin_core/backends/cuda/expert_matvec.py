"""FF products for tokens that each have their own expert set, or run on all neurons.

Each token reads its own weight rows, so tokens share no reads, and a product is a sum along a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.activations import ACTIVATION_CODES
from griffin_core.backends.cuda.activation import activate
from griffin_core.backends.cuda.expert_rows import ExpertRows, room_for_splits
from griffin_core.backends.cuda.rows import even_range, neurons_at, split_range, tile
from griffin_core.backends.cuda.tuning import config, pdl_options, pdl_wait, tuned
from griffin_core.spec.weights import FFWeights


@tuned(
    [
        config(4, 3, ROWS=1, BLOCK=1024),
        config(2, 4, ROWS=1, BLOCK=512),
        config(4, 2, ROWS=1, BLOCK=1024),
        config(4, 3, ROWS=2, BLOCK=1024),
        config(4, 3, ROWS=2, BLOCK=512),
        config(4, 3, ROWS=1, BLOCK=2048),
        config(4, 1, ROWS=1, BLOCK=1024),
    ],
    key=["width", "neurons", "GATED", "INDEXED"],
)
@triton.jit
def _activations(
    x,
    w_in,
    bias,
    norm,
    indices,
    slim_ids,
    counts,
    into,
    z,
    mapped,
    width,
    neurons,
    covered,
    eps,
    RANK: tl.constexpr,
    CODE: tl.constexpr,
    GATED: tl.constexpr,
    INDEXED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(1)
    count = neurons
    experts = indices
    if INDEXED:
        count = tl.load(counts + token).to(tl.int32)
        experts = indices + tl.load(slim_ids + token) * neurons
    up = w_in + neurons.to(tl.int64) * width
    programs = tl.cdiv(covered, ROWS)
    if RANK > 0:  # noqa: SIM102  # without a correction nothing of it is compiled
        if tl.program_id(0) >= programs:  # the last ones run the correction's map
            at = (tl.program_id(0) - programs) * ROWS + tl.arange(0, ROWS)
            own = into + tl.load(slim_ids + token) * RANK * width
            pdl_wait(OVERLAPS)
            _map(x, own, norm, mapped, at, token, width, eps, RANK, HAS_NORM, ROWS, BLOCK)
            return
    # For a set of more than half of the neurons, programs run twice: see the grid.
    stride = programs * ROWS
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = neurons_at(experts, at, count, INDEXED)
    pdl_wait(OVERLAPS)
    for begin in range(tl.program_id(0) * ROWS, count, stride):
        at = begin + tl.arange(0, ROWS)
        live = at < count
        first = tl.zeros((ROWS, BLOCK), tl.float32)
        second = tl.zeros((ROWS, BLOCK), tl.float32)
        square = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            w = tile(w_in, rows, live, columns, width)
            if GATED:
                u = tile(up, rows, live, columns, width)
            v = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                square += v * v
                v *= tl.load(norm + columns, mask=inside, other=0.0)
            first += w.to(tl.float32) * v[None, :]
            if GATED:
                second += u.to(tl.float32) * v[None, :]
        of = rows
        rows = neurons_at(experts, at + stride, count, INDEXED)
        factor = 1.0
        if HAS_NORM:
            factor = tl.rsqrt(tl.sum(square, axis=0) / width + eps)
        y = tl.sum(first, axis=1) * factor
        if HAS_BIAS:
            y += tl.load(bias + of, mask=live, other=0.0).to(tl.float32)
        y = activate(y, CODE)
        if GATED:
            y *= tl.sum(second, axis=1) * factor
        tl.store(z + token * neurons + at, y.to(z.dtype.element_ty), mask=live)


@triton.jit
def _map(
    x,
    into,
    norm,
    mapped,
    at,
    token,
    width,
    eps,
    RANK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes some values of x Aᵀ for one token."""
    live = at < RANK
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        v = tl.load(x + token * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        if HAS_NORM:
            square += v * v
            v *= tl.load(norm + columns, mask=columns < width, other=0.0)
        first += tile(into, at, live, columns, width).to(tl.float32) * v[None, :]
    y = tl.sum(first, axis=1)
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(square, axis=0) / width + eps)
    tl.store(mapped + token * RANK + at, y.to(mapped.dtype.element_ty), mask=live)


@tuned(
    [
        config(4, 1, NEURONS=32, BLOCK=128, SPLITS=16),
        config(4, 1, NEURONS=32, BLOCK=128, SPLITS=32),
        config(4, 3, NEURONS=32, BLOCK=128, SPLITS=16),
        config(4, 3, NEURONS=32, BLOCK=128, SPLITS=32),
        config(4, 1, NEURONS=16, BLOCK=128, SPLITS=16),
        config(4, 1, NEURONS=8, BLOCK=1024, SPLITS=64),
        config(4, 4, NEURONS=8, BLOCK=512, SPLITS=64),
    ],
    key=["width", "neurons", "INDEXED"],
)
@triton.jit
def _down(
    z,
    mapped,
    down,
    out,
    indices,
    slim_ids,
    counts,
    partial,
    width,
    neurons,
    RANK: tl.constexpr,
    INDEXED: tl.constexpr,
    OVERLAPS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    token, split = tl.program_id(2), tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    count = neurons
    experts = indices
    if INDEXED:
        count = tl.load(counts + token).to(tl.int32)
        experts = indices + tl.load(slim_ids + token) * neurons
    begin, end = split_range(count, split, SPLITS, NEURONS)
    at = begin + tl.arange(0, NEURONS)
    ahead = tile(down, neurons_at(experts, at, end, INDEXED), at < end, columns, width)
    pdl_wait(OVERLAPS)
    total = tl.zeros((NEURONS, BLOCK), tl.float32)
    for start in range(begin, end, NEURONS):
        at = start + tl.arange(0, NEURONS)
        w = ahead
        later = at + NEURONS
        rows = neurons_at(experts, later, end, INDEXED)
        ahead = tile(down, rows, later < end, columns, width)
        v = tl.load(z + token * neurons + at, mask=at < end, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * v[:, None]
    if RANK > 0:
        own = out + tl.load(slim_ids + token) * RANK * width
        first, last = even_range(RANK, split, SPLITS)
        for start in range(first, last, NEURONS):
            at = start + tl.arange(0, NEURONS)
            w = tile(own, at, at < last, columns, width)
            v = tl.load(mapped + token * RANK + at, mask=at < last, other=0.0).to(tl.float32)
            total += w.to(tl.float32) * v[:, None]
    to = partial + (token * SPLITS + split) * width + columns
    tl.store(to, tl.sum(total, axis=0), mask=inside)


def activations(
    x: Tensor, weights: FFWeights, sets: ExpertRows | None, norm: tuple[Tensor, float] | None
) -> tuple[Tensor, Tensor]:
    """Takes x [N, D]. Returns Z [N, F], in which the first K values of a row belong to its experts,
    and x Aᵀ [N, R] of its correction."""
    tokens, width = x.shape
    count, rank = weights.count, 0 if sets is None else sets.rank
    z, mapped = x.new_empty((tokens, count)), x.new_empty((tokens, rank))
    rows = count if sets is None else (count + 1) // 2  # the size of a set is not known on the host
    correction = None if sets is None else sets.correction

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["ROWS"]) + triton.cdiv(rank, meta["ROWS"]), tokens

    _activations[grid](
        x,
        weights.w_in,
        weights.up_bias,
        norm[0] if norm else None,
        sets.indices if sets else None,
        sets.slim_ids if sets else None,
        sets.counts if sets else None,
        correction and correction.into,
        z,
        mapped,
        width,
        count,
        rows,
        norm[1] if norm else 0.0,
        RANK=rank,
        CODE=ACTIVATION_CODES[weights.activation],
        GATED=weights.gated,
        INDEXED=sets is not None,
        HAS_NORM=norm is not None,
        HAS_BIAS=weights.up_bias is not None,
        **pdl_options(),
    )
    return z, mapped


def down(
    z: Tensor, mapped: Tensor, weights: FFWeights, sets: ExpertRows | None
) -> tuple[Tensor, int]:
    """Takes Z [N, F] and x Aᵀ [N, R] from ``activations``. Returns the sums of all splits, [N, n,
    D] float32, and the number of splits n."""
    tokens, width = z.shape[0], weights.down.shape[1]
    partial = room_for_splits(z, width, _down)
    correction = None if sets is None else sets.correction
    _down[lambda meta: (triton.cdiv(width, meta["BLOCK"]), meta["SPLITS"], tokens)](
        z,
        mapped,
        weights.down,
        correction and correction.out,
        sets.indices if sets else None,
        sets.slim_ids if sets else None,
        sets.counts if sets else None,
        partial,
        width,
        weights.count,
        RANK=mapped.shape[1],
        INDEXED=sets is not None,
        **pdl_options(),
    )
    splits: int = _down.best_config.kwargs["SPLITS"]
    return partial, splits
