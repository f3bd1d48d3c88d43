"""FF products in which up to 64 tokens share one expert set: each row is read once for all of them
and multiplied on tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.cpu.rows import ACTIVATION_CODES
from griffin_core.backends.cuda.activation import activate
from griffin_core.backends.cuda.expert_table import ExpertTable, room_for_splits
from griffin_core.backends.cuda.rows import neurons_at, split_range, tile
from griffin_core.backends.cuda.tuning import config, others_may_begin_and_i_wait, overlap, tuned
from griffin_core.model.feedforward import Neurons


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
    rows = neurons_at(experts, at, count, INDEXED=True)
    up = w_in + neurons.to(tl.int64) * width
    token = tl.arange(0, TOKENS)
    there = token < tokens
    others_may_begin_and_i_wait(OVERLAPS)
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
    begin, end = split_range(count, split, SPLITS, NEURONS)
    token = tl.arange(0, TOKENS)
    there = token < tokens
    others_may_begin_and_i_wait(OVERLAPS)
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
    tl.store(
        partial + (token[:, None] * SPLITS + split) * width + columns[None, :],
        total,
        mask=there[:, None] & inside[None, :],
    )


def activations(x: Tensor, neurons: Neurons, table: ExpertTable) -> Tensor:
    """x [N, D] -> Z [N, F], of which the first K values of a row are those of the experts."""
    tokens, width = x.shape
    count = neurons.count
    z = x.new_empty((tokens, count))
    _activations[lambda meta: (triton.cdiv(count, meta["NEURONS"]),)](
        x,
        neurons.w_in,
        neurons.up_bias,
        table.addresses,
        table.counts,
        z,
        tokens,
        width,
        count,
        CODE=ACTIVATION_CODES[neurons.activation],
        GATED=neurons.gated,
        HAS_BIAS=neurons.up_bias is not None,
        TOKENS=_padded(tokens),
        **overlap(),
    )
    return z


def down(z: Tensor, neurons: Neurons, table: ExpertTable) -> tuple[Tensor, int]:
    """Z [N, F] as of ``activations`` -> sums of splits [N, n, D] float32, and how many n there
    are of them."""
    tokens, width = z.shape[0], neurons.down.shape[1]
    partial = room_for_splits(z, width, _down)
    _down[lambda meta: (triton.cdiv(width, meta["BLOCK"]), meta["SPLITS"])](
        z,
        neurons.down,
        table.addresses,
        table.counts,
        partial,
        tokens,
        width,
        neurons.count,
        TOKENS=_padded(tokens),
        **overlap(),
    )
    splits: int = _down.best_config.kwargs["SPLITS"]
    return partial, splits


def _padded(tokens: int) -> int:
    """Rows of a tensor core's product."""
    return max(16, 1 << (tokens - 1).bit_length())
