"""Device functions that read a layer's weights: all rows of a matrix, or the rows of an expert
set."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def neurons_at(experts, at, count, INDEXED: tl.constexpr):
    """Returns the neurons at some positions of the set."""
    rows = at
    if INDEXED:
        rows = tl.load(experts + at, mask=at < count, other=0)
    return rows


@triton.jit
def tile(matrix, rows, live, columns, width):
    """Loads matrix[rows, columns], zero where a row is not live or a column is out of range."""
    return tl.load(
        matrix + rows.to(tl.int64)[:, None] * width + columns[None, :],
        mask=live[:, None] & (columns < width)[None, :],
        other=0.0,
    )


@triton.jit
def even_range(count, split, SPLITS: tl.constexpr):
    """Returns the first and the end position of a few rows that one split sums."""
    share = tl.cdiv(count, SPLITS)
    return split * share, tl.minimum(split * share + share, count)


@triton.jit
def split_range(count, split, SPLITS: tl.constexpr, NEURONS: tl.constexpr):
    """Returns the first and the end position of a set that one split sums, in whole blocks."""
    share = tl.cdiv(tl.cdiv(count, SPLITS), NEURONS) * NEURONS
    begin = split * share
    return begin, tl.minimum(begin + share, count)
