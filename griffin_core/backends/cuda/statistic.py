"""The statistic of a prompt's activations, which are read once and never copied to float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCK = 128, 64


@triton.jit
def _add_s2(
    s2,
    z,
    squares,
    bounds,
    stride,
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
    total = tl.zeros((ROWS, BLOCK), tl.float32)
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
        total += v * v * weight[:, None]
    own = s2 + number.to(tl.int64) * stride + columns
    before = tl.load(own, mask=inside, other=0.0)
    tl.store(own, before + tl.sum(total, axis=0), mask=inside)


def add_s2_columns(s2: Tensor, z: Tensor, squares: Tensor, bounds: Tensor) -> None:
    """See ``Backend.add_statistic``.

    Args:
        s2: [R, F] float32, each row contiguous.
        z: [N, F] bfloat16 or float16, contiguous.
        bounds: [R + 1] int32, as in ``RowRuns``.
    """
    width, parts = z.shape[1], squares.shape[1]
    _add_s2[(triton.cdiv(width, BLOCK), s2.shape[0])](
        s2,
        z,
        squares,
        bounds,
        s2.stride(0),
        width,
        parts,
        torch.finfo(torch.float32).tiny,
        ROWS=ROWS,
        BLOCK=BLOCK,
        PARTS=triton.next_power_of_2(parts),
        num_warps=8,
        num_stages=1,
    )
