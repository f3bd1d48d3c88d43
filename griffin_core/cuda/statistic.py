"""The statistic of a prompt's activations, read once and never widened in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 64
"""Of each program: so many rows are summed at once, the sums of all runs behind them."""


@triton.jit
def _s2(
    z,
    squares,
    sums,
    tokens,
    width,
    parts,
    tiny,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    begin = tl.program_id(1) * TOKENS
    part = tl.arange(0, PARTS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(begin, begin + TOKENS, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        there = rows < tokens
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
    tl.store(sums + tl.program_id(1) * width + columns, tl.sum(total, axis=0), mask=inside)


def s2_columns(z: Tensor, squares: Tensor) -> Tensor:
    """See ``experts.statistic.s2_of``; z [T, F] bfloat16 or float16, contiguous."""
    tokens, width = z.shape
    runs, parts = triton.cdiv(tokens, TOKENS), squares.shape[1]
    sums = z.new_empty((runs, width), dtype=torch.float32)
    block = 256
    _s2[(triton.cdiv(width, block), runs)](
        z,
        squares,
        sums,
        tokens,
        width,
        parts,
        torch.finfo(torch.float32).tiny,
        TOKENS=TOKENS,
        ROWS=16,
        BLOCK=block,
        PARTS=triton.next_power_of_2(parts),
    )
    return sums.sum(dim=0)
