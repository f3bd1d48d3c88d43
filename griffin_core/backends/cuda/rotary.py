"""Rotary positions of prompts' queries and keys, and their way into the caches, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the tokens of several prompts go, in device memory.

    Args:
        addresses: [L, R] int64, of each layer of each prompt's cache.
        capacities: [R] int64, tokens each cache has room for.
        starts: [R] int64, the position of each prompt's first token.
        bounds: [R + 1] int64: run r is rows bounds[r] to bounds[r + 1]. Rows after the last are
            padding, and go nowhere.
    """

    addresses: Tensor
    capacities: Tensor
    starts: Tensor
    bounds: Tensor


@triton.jit
def _rotate_and_store(
    qkv,
    cos,
    sin,
    addresses,
    capacities,
    starts,
    bounds,
    runs,
    heads,
    kv_heads,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    RUNS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROTATES: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    numbers = tl.arange(0, RUNS)
    ends = tl.load(bounds + 1 + numbers, mask=numbers < runs, other=0)
    run = tl.sum(((ends <= token) & (numbers < runs)).to(tl.int32), axis=0)
    real = run < runs
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
    place = tl.load(starts + run, mask=real, other=0) + token
    place -= tl.load(bounds + run, mask=real, other=0)
    capacity = tl.load(capacities + run, mask=real, other=0)
    cache = tl.load(addresses + run, mask=real, other=0).to(tl.pointer_type(DTYPE))
    # Keys of all heads, then values of all heads, as they stand in the row.
    to = cache + ((head - heads)[:, None] * capacity + place) * SIZE + d[None, :]
    kept = there & (head >= heads)[:, None] & real
    tl.store(to, x, mask=kept)
    tl.store(to + half, y, mask=kept)


def rotate_and_store(
    qkv: Tensor,
    heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    places: Places,
    layer: int,
) -> None:
    """Rotates queries and keys in place, and puts keys and values into the caches.

    Args:
        qkv: [N, H + 2 · kv_heads, head_dim], bfloat16 or float16, contiguous.
        heads: H.
        rotation: factors [N, 1, head_dim] as of ``attention.rotation``; None for no rotation.
    """
    tokens, every, size = qkv.shape
    assert qkv.is_contiguous()
    cos, sin = rotation or (qkv, qkv)
    runs = places.capacities.shape[0]
    at_once = 8
    _rotate_and_store[(triton.cdiv(every, at_once), tokens)](
        qkv,
        cos,
        sin,
        places.addresses[layer],
        places.capacities,
        places.starts,
        places.bounds,
        runs,
        heads,
        (every - heads) // 2,
        SIZE=size,
        HALF=triton.next_power_of_2(size // 2),
        HEADS=at_once,
        RUNS=triton.next_power_of_2(runs),
        DTYPE=_DTYPES[qkv.dtype],
        ROTATES=rotation is not None,
    )
