"""The statistics of a layer's activations, which are read once and never copied to float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCK = 128, 64


@triton.jit
def _add_sums(
    sums,
    z,
    squares,
    bounds,
    stride,
    apart,
    width,
    parts,
    tiny,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    number = tl.program_id(1)
    first = tl.load(bounds + number)
    tokens = tl.load(bounds + number + 1) - first
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    part = tl.arange(0, PARTS)
    relative = tl.zeros((ROWS, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    values = tl.zeros((BLOCK,), tl.float32)
    # The last tokens first: they were written last and may still be in the L2 cache.
    runs = tl.cdiv(tokens, ROWS)
    for run in range(runs):
        places = (runs - 1 - run) * ROWS + tl.arange(0, ROWS)
        there = places < tokens
        rows = (first + places).to(tl.int64)
        of_parts = tl.load(
            squares + rows[:, None] * parts + part[None, :],
            mask=there[:, None] & (part < parts)[None, :],
            other=0.0,
        )
        square = tl.sum(of_parts, axis=1)
        weight = tl.where(square >= tiny, 1.0 / tl.maximum(square, tiny), 0.0)
        v = tl.load(
            z + rows[:, None] * width + columns[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        relative += v * v * weight[:, None]
        total += tl.sum(v * v, axis=0)
        values += tl.sum(v, axis=0)
    own = sums + number.to(tl.int64) * stride + columns
    _add_to(own, tl.sum(relative, axis=0), inside)
    _add_to(own + apart, total, inside)
    _add_to(own + 2 * apart, values, inside)


@triton.jit
def _add_to(place, values, inside):
    tl.store(place, tl.load(place, mask=inside, other=0.0) + values, mask=inside)


def add_sums(sums: Tensor, z: Tensor, squares: Tensor, bounds: Tensor) -> None:
    """See ``Backend.add_statistic``.

    Args:
        sums: [R, 3, F] float32, the last dimension contiguous.
        z: [N, F] bfloat16 or float16, contiguous.
        bounds: [R + 1] int32, as in ``RowRuns``.
    """
    width, parts = z.shape[1], squares.shape[1]
    _add_sums[(triton.cdiv(width, BLOCK), sums.shape[0])](
        sums,
        z,
        squares,
        bounds,
        sums.stride(0),
        sums.stride(1),
        width,
        parts,
        torch.finfo(torch.float32).tiny,
        ROWS=ROWS,
        BLOCK=BLOCK,
        PARTS=triton.next_power_of_2(parts),
        num_warps=8,
        num_stages=1,
    )
