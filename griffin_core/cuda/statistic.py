"""The statistic of a prompt's activations, read once and never widened in memory."""

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
    tokens,
    width,
    parts,
    tiny,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    part = tl.arange(0, PARTS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    # The last tokens first: they were written last, and may still be in the cache.
    runs = tl.cdiv(tokens, ROWS)
    for run in range(runs):
        rows = ((runs - 1 - run) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
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
    before = tl.load(s2 + columns, mask=inside, other=0.0)
    tl.store(s2 + columns, before + tl.sum(total, axis=0), mask=inside)


def add_s2_columns(s2: Tensor, z: Tensor, squares: Tensor) -> None:
    """See ``experts.statistic.add_s2``; z [T, F] bfloat16 or float16, contiguous."""
    tokens, width = z.shape
    parts = squares.shape[1]
    _add_s2[(triton.cdiv(width, BLOCK),)](
        s2,
        z,
        squares,
        tokens,
        width,
        parts,
        torch.finfo(torch.float32).tiny,
        ROWS=ROWS,
        BLOCK=BLOCK,
        PARTS=triton.next_power_of_2(parts),
        num_warps=8,
        num_stages=1,
    )
