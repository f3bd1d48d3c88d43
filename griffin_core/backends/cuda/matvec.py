"""Matrix-vector products, fused with the RMSNorm before them and the residual add after them.

The norm's weight scales the input, and its factor, one number per row, scales the output, so each
program normalizes while it multiplies. Sums are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.cuda.rows import tile
from griffin_core.backends.cuda.tuning import config, pdl_options, pdl_wait, tuned


@tuned(
    [
        config(4, 1, ROWS=4, BLOCK=512),
        config(4, 1, ROWS=4, BLOCK=1024),
        config(4, 2, ROWS=4, BLOCK=1024),
        config(4, 3, ROWS=2, BLOCK=1024),
        config(4, 3, ROWS=4, BLOCK=512),
        config(4, 1, ROWS=2, BLOCK=1024),
        config(4, 1, ROWS=8, BLOCK=256),
        config(2, 1, ROWS=2, BLOCK=512),
    ],
    key=["inner", "outer", "HAS_NORM"],
)
@triton.jit
def _matvec(
    x,
    weight,
    bias,
    norm,
    residual,
    out,
    inner,
    outer,
    eps,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < outer
    ahead = tile(weight, rows, live, tl.arange(0, BLOCK), inner)
    pdl_wait(OVERLAPS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, inner, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < inner
        w = ahead
        ahead = tile(weight, rows, live, columns + BLOCK, inner)
        v = tl.load(x + token * inner + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            square += v * v
            v *= tl.load(norm + columns, mask=inside, other=0.0)
        total += w.to(tl.float32) * v[None, :]
    y = tl.sum(total, axis=1)
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(square, axis=0) / inner + eps)
    if HAS_BIAS:
        y += tl.load(bias + rows, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + token * outer + rows, mask=live, other=0.0).to(tl.float32)
    tl.store(out + token * outer + rows, y.to(out.dtype.element_ty), mask=live)


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Returns x [N, in] weightᵀ + bias + residual [N, out]. The whole weight is read for every row
    of x.

    Args:
        x: bfloat16 or float16, contiguous, as are all but ``norm``.
        weight: [out, in].
        bias: [out].
        norm: weight [in] float32 and eps of an RMSNorm applied to x first.
        residual: [N, out].
    """
    tokens, inner = x.shape
    outer = weight.shape[0]
    out = x.new_empty((tokens, outer))

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(outer, meta["ROWS"]), tokens

    _matvec[grid](
        x,
        weight,
        bias,
        norm[0] if norm else None,
        residual,
        out,
        inner,
        outer,
        norm[1] if norm else 0.0,
        HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        **pdl_options(),
    )
    return out


@triton.jit
def _rms_norm(
    x,
    weight,
    residual,
    out,
    width,
    eps,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    pdl_wait(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    v = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    y = v * tl.rsqrt(tl.sum(v * v, axis=0) / width + eps)
    y *= tl.load(weight + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Applies RMSNorm to x [N, D] in float32, then adds residual [N, D]."""
    out = torch.empty_like(x)
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](
        x,
        weight,
        residual,
        out,
        width,
        eps,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        **pdl_options(),
        num_warps=min(16, max(1, block // 512)),
    )
    return out
