"""FF blocks on experts, read by index from a layer's resident weights.

``matvec`` forms give each token a set of its own; ``shared`` forms give all of up to 64 tokens one
set, and multiply on tensor cores. A set is an address of int32 neuron numbers and their count, both
read from tables in device memory, so that a captured graph runs on whatever stands there. Without
tables, all neurons are run. Down projections are split over the neurons and summed in a fixed
order, so results repeat to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin_core.cuda.activation import activate
from griffin_core.cuda.tuning import config, others_may_begin_and_i_wait, overlap, tuned
from griffin_core.kernels.rows import ACTIVATION_CODES
from griffin_core.model.feedforward import Neurons

MAX_SHARED_TOKENS = 64
SUM_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class ExpertTable:
    """The sets of a step's tokens, in one layer.

    Args:
        addresses: [N] int64, where each token's neuron numbers lie, int32 each.
        counts: [N] int64, how many they are; at most F.
        shared: all tokens have the set of the first.
    """

    addresses: Tensor
    counts: Tensor
    shared: bool


@triton.jit
def _neurons_at(experts, at, count, INDEXED: tl.constexpr):
    """Which neurons stand at these places of the set."""
    rows = at
    if INDEXED:
        rows = tl.load(experts + at, mask=at < count, other=0)
    return rows


@triton.jit
def _tile(matrix, rows, live, columns, width):
    """matrix[rows, columns], zero where a row is not live or a column not there."""
    return tl.load(
        matrix + rows.to(tl.int64)[:, None] * width + columns[None, :],
        mask=live[:, None] & (columns < width)[None, :],
        other=0.0,
    )


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
    addresses,
    counts,
    z,
    width,
    neurons,
    eps,
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
    experts = addresses
    if INDEXED:
        count = tl.load(counts + token).to(tl.int32)
        experts = tl.load(addresses + token).to(tl.pointer_type(tl.int32))
    up = w_in + neurons.to(tl.int64) * width
    # Of a set of more than half of the neurons, programs run twice: see the grid.
    stride = tl.num_programs(0) * ROWS
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = _neurons_at(experts, at, count, INDEXED)
    others_may_begin_and_i_wait(OVERLAPS)
    for begin in range(tl.program_id(0) * ROWS, count, stride):
        at = begin + tl.arange(0, ROWS)
        live = at < count
        first = tl.zeros((ROWS, BLOCK), tl.float32)
        second = tl.zeros((ROWS, BLOCK), tl.float32)
        square = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            w = _tile(w_in, rows, live, columns, width)
            if GATED:
                u = _tile(up, rows, live, columns, width)
            v = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                square += v * v
                v *= tl.load(norm + columns, mask=inside, other=0.0)
            first += w.to(tl.float32) * v[None, :]
            if GATED:
                second += u.to(tl.float32) * v[None, :]
        of = rows
        rows = _neurons_at(experts, at + stride, count, INDEXED)
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
    down,
    addresses,
    counts,
    partial,
    width,
    neurons,
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
    experts = addresses
    if INDEXED:
        count = tl.load(counts + token).to(tl.int32)
        experts = tl.load(addresses + token).to(tl.pointer_type(tl.int32))
    share = tl.cdiv(tl.cdiv(count, SPLITS), NEURONS) * NEURONS
    begin = split * share
    end = tl.minimum(begin + share, count)
    at = begin + tl.arange(0, NEURONS)
    ahead = _tile(down, _neurons_at(experts, at, end, INDEXED), at < end, columns, width)
    others_may_begin_and_i_wait(OVERLAPS)
    total = tl.zeros((NEURONS, BLOCK), tl.float32)
    for start in range(begin, end, NEURONS):
        at = start + tl.arange(0, NEURONS)
        w = ahead
        later = at + NEURONS
        rows = _neurons_at(experts, later, end, INDEXED)
        ahead = _tile(down, rows, later < end, columns, width)
        v = tl.load(z + token * neurons + at, mask=at < end, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * v[:, None]
    to = partial + (token * SPLITS + split) * width + columns
    tl.store(to, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _sum_splits(
    partial,
    bias,
    residual,
    splits,
    out,
    width,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    others_may_begin_and_i_wait(OVERLAPS)
    token = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(
            partial + (token * splits + split) * width + columns, mask=inside, other=0.0
        )
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


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
def _activations_shared(
    x,
    w_in,
    bias,
    addresses,
    counts,
    z,
    tokens,
    width,
    neurons,
    CODE: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0) * NEURONS
    count = tl.load(counts).to(tl.int32)
    if begin >= count:
        others_may_begin_and_i_wait(OVERLAPS)  # whoever comes behind relies on the order
        return
    at = begin + tl.arange(0, NEURONS)
    live = at < count
    experts = tl.load(addresses).to(tl.pointer_type(tl.int32))
    rows = tl.load(experts + at, mask=live, other=0)
    offsets = rows.to(tl.int64)[:, None] * width
    up_offset = neurons.to(tl.int64) * width
    token = tl.arange(0, TOKENS)
    there = token < tokens
    others_may_begin_and_i_wait(OVERLAPS)
    first = tl.zeros((TOKENS, NEURONS), tl.float32)
    second = tl.zeros((TOKENS, NEURONS), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        mask = live[:, None] & inside[None, :]
        v = tl.load(
            x + token[:, None] * width + columns[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(w_in + offsets + columns[None, :], mask=mask, other=0.0)
        first = tl.dot(v, tl.trans(w), first)
        if GATED:
            u = tl.load(w_in + up_offset + offsets + columns[None, :], mask=mask, other=0.0)
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
def _down_shared(
    z,
    down,
    addresses,
    counts,
    partial,
    tokens,
    width,
    neurons,
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
    experts = tl.load(addresses).to(tl.pointer_type(tl.int32))
    share = tl.cdiv(tl.cdiv(count, SPLITS), NEURONS) * NEURONS
    begin = split * share
    end = tl.minimum(begin + share, count)
    token = tl.arange(0, TOKENS)
    there = token < tokens
    others_may_begin_and_i_wait(OVERLAPS)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(begin, end, NEURONS):
        at = start + tl.arange(0, NEURONS)
        live = at < end
        rows = tl.load(experts + at, mask=live, other=0)
        v = tl.load(
            z + token[:, None] * neurons + at[None, :],
            mask=there[:, None] & live[None, :],
            other=0.0,
        )
        w = tl.load(
            down + rows.to(tl.int64)[:, None] * width + columns[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot(v, w, total)
    tl.store(
        partial + (token[:, None] * SPLITS + split) * width + columns[None, :],
        total,
        mask=there[:, None] & inside[None, :],
    )


def feedforward(
    x: Tensor,
    neurons: Neurons,
    table: ExpertTable | None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """An FF block on experts, of x [N, D], with N at most ``MAX_SHARED_TOKENS`` if they share.

    Args:
        x: bfloat16 or float16, contiguous.
        neurons: all of the layer.
        table: whose set each token runs on; None for all neurons.
        norm: weight [D] float32 and eps of an RMSNorm over x first; not for a shared set.
        residual: [N, D], added behind.

    Returns:
        [N, D].
    """
    tokens, width = x.shape
    count, code = neurons.count, ACTIVATION_CODES[neurons.activation]
    addresses = table.addresses if table else None
    counts = table.counts if table else None
    z = x.new_empty((tokens, count))
    if table is not None and table.shared:
        assert norm is None and tokens <= MAX_SHARED_TOKENS
        padded = max(16, triton.next_power_of_2(tokens))
        _activations_shared[lambda meta: (triton.cdiv(count, meta["NEURONS"]),)](
            x,
            neurons.w_in,
            neurons.up_bias,
            addresses,
            counts,
            z,
            tokens,
            width,
            count,
            CODE=code,
            GATED=neurons.gated,
            HAS_BIAS=neurons.up_bias is not None,
            TOKENS=padded,
            **overlap(),
        )
        partial = _partial(x, _down_shared)
        _down_shared[lambda meta: (triton.cdiv(width, meta["BLOCK"]), meta["SPLITS"])](
            z,
            neurons.down,
            addresses,
            counts,
            partial,
            tokens,
            width,
            count,
            TOKENS=padded,
            **overlap(),
        )
        splits = _down_shared.best_config.kwargs["SPLITS"]
    else:
        rows = count if table is None else (count + 1) // 2  # how many a table has is not known
        _activations[lambda meta: (triton.cdiv(rows, meta["ROWS"]), tokens)](
            x,
            neurons.w_in,
            neurons.up_bias,
            norm[0] if norm else None,
            addresses,
            counts,
            z,
            width,
            count,
            norm[1] if norm else 0.0,
            CODE=code,
            GATED=neurons.gated,
            INDEXED=table is not None,
            HAS_NORM=norm is not None,
            HAS_BIAS=neurons.up_bias is not None,
            **overlap(),
        )
        partial = _partial(x, _down)
        _down[lambda meta: (triton.cdiv(width, meta["BLOCK"]), meta["SPLITS"], tokens)](
            z,
            neurons.down,
            addresses,
            counts,
            partial,
            width,
            count,
            INDEXED=table is not None,
            **overlap(),
        )
        splits = _down.best_config.kwargs["SPLITS"]
    out = torch.empty_like(x)
    _sum_splits[(triton.cdiv(width, SUM_BLOCK), tokens)](
        partial,
        neurons.down_bias,
        residual,
        splits,
        out,
        width,
        HAS_BIAS=neurons.down_bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK=SUM_BLOCK,
        **overlap(),
    )
    return out


def _partial(x: Tensor, kernel: Any) -> Tensor:
    """Room for the sums of all splits, however many are chosen."""
    most = max(config.kwargs["SPLITS"] for config in kernel.configs)
    return torch.empty((x.shape[0], most, x.shape[1]), dtype=torch.float32, device=x.device)
