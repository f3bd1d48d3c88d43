"""How kernels read a layer's weights: all rows of a matrix, or those of an expert set."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def neurons_at(experts, at, count, INDEXED: tl.constexpr):
    """Which neurons stand at these places of the set."""
    rows = at
    if INDEXED:
        rows = tl.load(experts + at, mask=at < count, other=0)
    return rows


@triton.jit
def tile(matrix, rows, live, columns, width):
    """matrix[rows, columns], zero where a row is not live or a column not there."""
    return tl.load(
        matrix + rows.to(tl.int64)[:, None] * width + columns[None, :],
        mask=live[:, None] & (columns < width)[None, :],
        other=0.0,
    )


@triton.jit
def split_range(count, split, SPLITS: tl.constexpr, NEURONS: tl.constexpr):
    """First and end of the places of a set that one of its splits sums: whole blocks."""
    share = tl.cdiv(tl.cdiv(count, SPLITS), NEURONS) * NEURONS
    begin = split * share
    return begin, tl.minimum(begin + share, count)
