"""FF products for up to 64 tokens that share one expert set: each weight row is read once for all
of them and multiplied on tensor cores."""

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
        config(4, 3, NEURONS=32, BLOCK=128),
        config(4, 4, NEURONS=16, BLOCK=128),
        config(4, 4, NEURONS=32, BLOCK=64),
        config(4, 3, NEURONS=64, BLOCK=64),
        config(8, 3, NEURONS=64, BLOCK=128),
        config(4, 5, NEURONS=16, BLOCK=256),
    ],
    key=["width", "neurons", "TOKENS"],
)
@triton.jit
def _activations(
    x,
    w_in,
    bias,
    indices,
    slim_ids,
    counts,
    into,
    z,
    mapped,
    tokens,
    width,
    neurons,
    RANK: tl.constexpr,
    CODE: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    mapping = tl.cdiv(RANK, NEURONS)
    if RANK > 0:  # noqa: SIM102  # without a correction nothing of it is compiled
        if tl.program_id(0) < mapping:  # the first ones run the correction's map
            at = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
            own = into + tl.load(slim_ids) * RANK * width
            pdl_wait(OVERLAPS)
            _map(x, own, mapped, at, tokens, width, RANK, TOKENS, NEURONS, BLOCK)
            return
    begin = (tl.program_id(0) - mapping) * NEURONS
    count = tl.load(counts).to(tl.int32)
    if begin >= count:
        pdl_wait(OVERLAPS)  # later launches rely on this order
        return
    at = begin + tl.arange(0, NEURONS)
    live = at < count
    experts = indices + tl.load(slim_ids) * neurons
    rows = neurons_at(experts, at, count, INDEXED=True)
    up = w_in + neurons.to(tl.int64) * width
    token = tl.arange(0, TOKENS)
    there = token < tokens
    pdl_wait(OVERLAPS)
    first = tl.zeros((TOKENS, NEURONS), tl.float32)
    second = tl.zeros((TOKENS, NEURONS), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        v = tl.load(
            x + token[:, None] * width + columns[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        w = tile(w_in, rows, live, columns, width)
        first = tl.dot(v, tl.trans(w), first)
        if GATED:
            u = tile(up, rows, live, columns, width)
            second = tl.dot(v, tl.trans(u), second)
    if HAS_BIAS:
        first += tl.load(bias + rows, mask=live, other=0.0).to(tl.float32)[None, :]
    y = activate(first, CODE)
    if GATED:
        y *= second
    tl.store(
        z + token[:, None] * neurons + at[None, :],
        y.to(z.dtype.element_ty),
        mask=there[:, None] & live[None, :],
    )


@triton.jit
def _map(
    x,
    into,
    mapped,
    at,
    tokens,
    width,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes some columns of x Aᵀ for all tokens."""
    token = tl.arange(0, TOKENS)
    there = token < tokens
    live = at < RANK
    total = tl.zeros((TOKENS, NEURONS), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        v = tl.load(
            x + token[:, None] * width + columns[None, :],
            mask=there[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        total = tl.dot(v, tl.trans(tile(into, at, live, columns, width)), total)
    tl.store(
        mapped + token[:, None] * RANK + at[None, :],
        total.to(mapped.dtype.element_ty),
        mask=there[:, None] & live[None, :],
    )


@tuned(
    [
        config(4, 3, NEURONS=32, BLOCK=128, SPLITS=8),
        config(4, 4, NEURONS=32, BLOCK=64, SPLITS=8),
        config(4, 4, NEURONS=64, BLOCK=64, SPLITS=8),
        config(4, 3, NEURONS=64, BLOCK=128, SPLITS=16),
        config(4, 4, NEURONS=32, BLOCK=128, SPLITS=16),
        config(8, 3, NEURONS=64, BLOCK=256, SPLITS=16),
    ],
    key=["width", "neurons", "TOKENS"],
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
    tokens,
    width,
    neurons,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    split = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    count = tl.load(counts).to(tl.int32)
    experts = indices + tl.load(slim_ids) * neurons
    begin, end = split_range(count, split, SPLITS, NEURONS)
    token = tl.arange(0, TOKENS)
    there = token < tokens
    pdl_wait(OVERLAPS)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(begin, end, NEURONS):
        at = start + tl.arange(0, NEURONS)
        live = at < end
        rows = neurons_at(experts, at, end, INDEXED=True)
        v = tl.load(
            z + token[:, None] * neurons + at[None, :],
            mask=there[:, None] & live[None, :],
            other=0.0,
        )
        w = tile(down, rows, live, columns, width)
        total = tl.dot(v, w, total)
    if RANK > 0:
        own = out + tl.load(slim_ids) * RANK * width
        first, last = even_range(RANK, split, SPLITS)
        for start in range(first, last, NEURONS):
            at = start + tl.arange(0, NEURONS)
            v = tl.load(
                mapped + token[:, None] * RANK + at[None, :],
                mask=there[:, None] & (at < last)[None, :],
                other=0.0,
            )
            total = tl.dot(v, tile(own, at, at < last, columns, width), total)
    tl.store(
        partial + (token[:, None] * SPLITS + split) * width + columns[None, :],
        total,
        mask=there[:, None] & inside[None, :],
    )


def activations(x: Tensor, weights: FFWeights, sets: ExpertRows) -> tuple[Tensor, Tensor]:
    """Takes x [N, D]. Returns Z [N, F], in which the first K values of a row belong to the experts,
    and x Aᵀ [N, R] of their correction."""
    tokens, width = x.shape
    count, rank, correction = weights.count, sets.rank, sets.correction
    z, mapped = x.new_empty((tokens, count)), x.new_empty((tokens, rank))

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(count, meta["NEURONS"]) + triton.cdiv(rank, meta["NEURONS"]),)

    _activations[grid](
        x,
        weights.w_in,
        weights.up_bias,
        sets.indices,
        sets.slim_ids,
        sets.counts,
        correction and correction.into,
        z,
        mapped,
        tokens,
        width,
        count,
        RANK=rank,
        CODE=ACTIVATION_CODES[weights.activation],
        GATED=weights.gated,
        HAS_BIAS=weights.up_bias is not None,
        TOKENS=_padded(tokens),
        **pdl_options(),
    )
    return z, mapped


def down(z: Tensor, mapped: Tensor, weights: FFWeights, sets: ExpertRows) -> tuple[Tensor, int]:
    """Takes Z [N, F] and x Aᵀ [N, R] from ``activations``. Returns the sums of all splits, [N, n,
    D] float32, and the number of splits n."""
    tokens, width = z.shape[0], weights.down.shape[1]
    partial = room_for_splits(z, width, _down)
    _down[lambda meta: (triton.cdiv(width, meta["BLOCK"]), meta["SPLITS"])](
        z,
        mapped,
        weights.down,
        sets.correction and sets.correction.out,
        sets.indices,
        sets.slim_ids,
        sets.counts,
        partial,
        tokens,
        width,
        weights.count,
        RANK=mapped.shape[1],
        TOKENS=_padded(tokens),
        **pdl_options(),
    )
    splits: int = _down.best_config.kwargs["SPLITS"]
    return partial, splits


def _padded(tokens: int) -> int:
    """Returns the number of rows of the tensor-core product, padded for its tile size."""
    return max(16, 1 << (tokens - 1).bit_length())
