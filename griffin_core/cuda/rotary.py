"""Rotary positions of a prompt's queries and keys, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x, cos, sin, stride, heads, SIZE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr
):
    token = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF)
    half: tl.constexpr = SIZE // 2
    inside = d < half
    there = (head < heads)[:, None] & inside[None, :]
    low = x + token * stride + head[:, None] * SIZE + d[None, :]
    a = tl.load(low, mask=there, other=0.0).to(tl.float32)
    b = tl.load(low + half, mask=there, other=0.0).to(tl.float32)
    c, s = cos + token * SIZE + d, sin + token * SIZE + d
    c_low = tl.load(c, mask=inside, other=0.0).to(tl.float32)
    c_high = tl.load(c + half, mask=inside, other=0.0).to(tl.float32)
    s_low = tl.load(s, mask=inside, other=0.0).to(tl.float32)
    s_high = tl.load(s + half, mask=inside, other=0.0).to(tl.float32)
    to = x.dtype.element_ty
    tl.store(low, (a * c_low[None, :] + b * s_low[None, :]).to(to), mask=there)
    tl.store(low + half, (b * c_high[None, :] + a * s_high[None, :]).to(to), mask=there)


def rotate_rows(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See ``model.attention.rotate``; x [N, heads, head_dim] bfloat16 or float16, its heads one
    behind the other."""
    tokens, heads, size = x.shape
    assert x.stride()[1:] == (size, 1)
    at_once = 8
    _rotate[(triton.cdiv(heads, at_once), tokens)](
        x,
        cos,
        sin,
        x.stride(0),
        heads,
        SIZE=size,
        HALF=triton.next_power_of_2(size // 2),
        HEADS=at_once,
    )
