"""Rotates the queries and keys of prompts, and stores keys and values in the KV pool, in one
pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.cuda.tuning import TRITON_DTYPES


@triton.jit
def _rotate_and_store(
    qkv,
    cos,
    sin,
    kv,
    places,
    slots,
    heads,
    kv_heads,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROTATES: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF)
    half: tl.constexpr = SIZE // 2
    inside = d < half
    every = heads + 2 * kv_heads
    there = (head < every)[:, None] & inside[None, :]
    low = qkv + (token * every + head[:, None]) * SIZE + d[None, :]
    x = tl.load(low, mask=there, other=0.0)
    y = tl.load(low + half, mask=there, other=0.0)
    if ROTATES:
        turned = (head < heads + kv_heads)[:, None]
        a, b = x.to(tl.float32), y.to(tl.float32)
        c, s = cos + token * SIZE + d, sin + token * SIZE + d
        c_low = tl.load(c, mask=inside, other=0.0).to(tl.float32)[None, :]
        c_high = tl.load(c + half, mask=inside, other=0.0).to(tl.float32)[None, :]
        s_low = tl.load(s, mask=inside, other=0.0).to(tl.float32)[None, :]
        s_high = tl.load(s + half, mask=inside, other=0.0).to(tl.float32)[None, :]
        x = tl.where(turned, a * c_low + b * s_low, a).to(DTYPE)
        y = tl.where(turned, b * c_high + a * s_high, b).to(DTYPE)
        tl.store(low, x, mask=there & turned)
        tl.store(low + half, y, mask=there & turned)
    place = tl.load(places + token)
    # Keys of all heads, then values of all heads, as in the row of qkv.
    to = kv + ((head - heads).to(tl.int64)[:, None] * slots + place) * SIZE + d[None, :]
    kept = there & (head >= heads)[:, None] & (place >= 0)
    tl.store(to, x, mask=kept)
    tl.store(to + half, y, mask=kept)


def rotate_and_store(
    qkv: Tensor, heads: int, rope: tuple[Tensor, Tensor] | None, kv: Tensor, places: Tensor
) -> None:
    """Rotates queries and keys in place, and stores keys and values.

    Args:
        qkv: [N, H + 2 · kv_heads, head_dim], bfloat16 or float16, contiguous.
        heads: H.
        rope: factors [N, 1, head_dim] from ``attention.rope_factors``; None for no rotation.
        kv: [2, kv_heads, slots, head_dim], one layer of the pool, of qkv's dtype.
        places: [N] int64, the KV slot of each row; below 0 for rows that are padding, which are not
            stored.
    """
    tokens, every, size = qkv.shape
    assert qkv.is_contiguous()
    cos, sin = rope or (qkv, qkv)
    at_once = 8
    _rotate_and_store[(triton.cdiv(every, at_once), tokens)](
        qkv,
        cos,
        sin,
        kv,
        places,
        kv.shape[2],
        heads,
        (every - heads) // 2,
        SIZE=size,
        HALF=triton.next_power_of_2(size // 2),
        HEADS=at_once,
        DTYPE=TRITON_DTYPES[qkv.dtype],
        ROTATES=rope is not None,
    )
