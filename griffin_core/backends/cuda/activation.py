"""The activation of an FF block, elementwise, and what the statistic needs of it on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.cuda.expert_rows import ExpertRows

BLOCK = 4096
"""Wide, because what weighs the rows reads a sum of squares from each."""

ZEROED_BLOCK = 1024
"""Narrower: a step has few rows, and each must bring work for many multiprocessors."""


@triton.jit
def activate(x, CODE: tl.constexpr):
    """One of ``ACTIVATION_CODES``, of float32."""
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
    """Activations of h [T, 2F], gate and up beside each other, or of h [T, F] of a plain FF.

    Args:
        h: bfloat16 or float16, contiguous.
        code: of ``ACTIVATION_CODES``.

    Returns:
        z [T, F], and the squares of its rows' norms in parts, [T, n] float32: their sum is ‖z_t‖².
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
    """Activations of h [N, 2F] or, of a plain FF, [N, F], each row's zeroed outside its own set.

    Args:
        h: bfloat16 or float16, contiguous.
        code: of ``ACTIVATION_CODES``.
        sets: what each row runs on; None for all neurons.

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
