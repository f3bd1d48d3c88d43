"""The elementwise activation of an FF block, which also computes the row norms that the statistic
needs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.cuda.expert_rows import ExpertRows

BLOCK = 4096
"""The number of columns per program. Wide, because the statistic's kernel reads a sum of squares
from each."""

ZEROED_BLOCK = 1024
"""The number of columns per program for zeroed rows. Narrow, since a step has few rows, and each
must give work to many multiprocessors."""


@triton.jit
def activate(x, CODE: tl.constexpr):
    """Applies an activation, given by its code in ``ACTIVATION_CODES``, to float32 values."""
    if CODE == 0:
        return x * tl.sigmoid(x)
    elif CODE == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CODE == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def _activate_rows(
    h, z, squares, width, CODE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    token, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    row = h + token * width * (2 if GATED else 1) + columns
    y = activate(tl.load(row, mask=inside, other=0.0).to(tl.float32), CODE)
    if GATED:
        y *= tl.load(row + width, mask=inside, other=0.0).to(tl.float32)
    y = y.to(z.dtype.element_ty)
    tl.store(z + token * width + columns, y, mask=inside)
    kept = tl.where(inside, y.to(tl.float32), 0.0)
    tl.store(squares + token * tl.num_programs(0) + block, tl.sum(kept * kept, axis=0))


def activate_rows(h: Tensor, code: int, *, gated: bool) -> tuple[Tensor, Tensor]:
    """Applies the activation to h [T, 2F], gate then up, or to h [T, F] for a plain FF.

    Args:
        h: bfloat16 or float16, contiguous.
        code: a value of ``ACTIVATION_CODES``.

    Returns:
        z [T, F], and parts [T, n] float32 whose sum is each row's ‖z_t‖².
    """
    tokens = h.shape[0]
    width = h.shape[1] // 2 if gated else h.shape[1]
    blocks = triton.cdiv(width, BLOCK)
    z = h.new_empty((tokens, width))
    squares = h.new_empty((tokens, blocks), dtype=torch.float32)
    _activate_rows[(blocks, tokens)](
        h, z, squares, width, CODE=code, GATED=gated, BLOCK=BLOCK, num_warps=8
    )
    return z, squares


@triton.jit
def _activate_own(
    h,
    keep,
    slim_ids,
    z,
    width,
    CODE: tl.constexpr,
    GATED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    own = inside
    if HAS_MASK:
        own_keep = keep + tl.load(slim_ids + token) * width
        own = tl.load(own_keep + columns, mask=inside, other=0) != 0
    row = h + token * width * (2 if GATED else 1) + columns
    y = activate(tl.load(row, mask=own, other=0.0).to(tl.float32), CODE)
    if GATED:
        y *= tl.load(row + width, mask=own, other=0.0).to(tl.float32)
    y = tl.where(own, y, 0.0)
    tl.store(z + token * width + columns, y.to(z.dtype.element_ty), mask=inside)


def activate_own(h: Tensor, code: int, sets: ExpertRows | None, *, gated: bool) -> Tensor:
    """Applies the activation to h [N, 2F], or h [N, F] for a plain FF, and zeroes each row outside
    its own set.

    Args:
        h: bfloat16 or float16, contiguous.
        code: a value of ``ACTIVATION_CODES``.
        sets: the expert set of each row; None for all neurons.

    Returns:
        z [N, F].
    """
    tokens = h.shape[0]
    width = h.shape[1] // 2 if gated else h.shape[1]
    z = h.new_empty((tokens, width))
    _activate_own[(triton.cdiv(width, ZEROED_BLOCK), tokens)](
        h,
        None if sets is None else sets.keep,
        None if sets is None else sets.slim_ids,
        z,
        width,
        CODE=code,
        GATED=gated,
        HAS_MASK=sets is not None,
        BLOCK=ZEROED_BLOCK,
        num_warps=4,
    )
    return z
