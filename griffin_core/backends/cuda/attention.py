"""Attention of one new token of each session over its own cache, whatever its length.

Caches are found by their addresses in a table in device memory, so a captured graph runs on
whatever stands there. A cache's tokens are split among programs; the last of them also rotates the
new key, uses it, and writes key and value into the cache. Scores and sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.cuda.tuning import others_may_begin_and_i_wait, overlap

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e30)
"""Below every score. Infinity less infinity would be no number."""
MAX_SPLITS = 32

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, kw_only=True)
class DeviceCaches:
    """Where the caches of a step's sessions lie, in device memory.

    Args:
        addresses: [L, N] int64, of each layer of each cache.
        starts: [N] int64, the position of each new token.
        capacities: [N] int64, tokens each cache has room for.
    """

    addresses: Tensor
    starts: Tensor
    capacities: Tensor


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the work is cut up.

    Args:
        splits: programs a cache and key head.
        block: cached tokens at once.
    """

    splits: int
    block: int


def plan(rows: int, heads: int, kv_heads: int, size: int, programs: int) -> Plan:
    """The one for so many caches. Graphs outlive the lengths they were captured at, so nothing
    depends on them.

    Args:
        programs: how many the device runs at once.
    """
    splits = max(1, min(MAX_SPLITS, programs // (rows * kv_heads)))
    # A block's sums are what registers hold most of.
    block = 8192 // (triton.next_power_of_2(heads // kv_heads) * triton.next_power_of_2(size))
    return Plan(splits=splits, block=max(4, block))


@triton.jit
def _head(
    x,
    cos,
    sin,
    norm,
    eps,
    at,
    d,
    mask,
    SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """Heads [rows, 1, SIZE] at x + at, normalized and rotated."""
    swapped = (d + SIZE // 2) % SIZE
    inside = d < SIZE
    v = tl.load(x + at + d, mask=mask, other=0.0).to(tl.float32)
    w = v
    if ROTATES:
        w = tl.load(x + at + swapped, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(v * v, axis=2, keep_dims=True) / SIZE + eps)
        v *= factor * tl.load(norm + d, mask=inside, other=0.0)
        w *= factor * tl.load(norm + swapped, mask=inside, other=0.0)
    if ROTATES:
        c = tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)
        v = v * c + w * s
    return v


@triton.jit
def _scores(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """q [rows, 1, SIZE], k [1, T, SIZE] -> scores [rows, T, 1]."""
    s = tl.sum(q * k, axis=2, keep_dims=True) * scale
    if HAS_SOFTCAP:
        s = softcap * (1.0 - 2.0 / (tl.exp2(2.0 * LOG2_E * s / softcap) + 1.0))
    return s


@triton.jit
def _attend(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    table,
    starts,
    capacities,
    sums,
    weights,
    largest,
    eps,
    scale,
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    ROTATES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + row).to(tl.int32)
    capacity = tl.load(capacities + row)
    cache = tl.load(table + row).to(tl.pointer_type(DTYPE))
    # Of 16 bytes; only what is known to be so is read in pieces of that size.
    keys = tl.multiple_of(cache, 16) + head * capacity * SIZE
    values = keys + KV_HEADS * capacity * SIZE
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(0, start + 1 - window)
    share = tl.cdiv(tl.cdiv(start - first, SPLITS), BLOCK) * BLOCK
    begin = first + split * share
    end = tl.minimum(begin + share, start)
    d = tl.arange(0, WIDTH)[None, None, :]
    t = begin + tl.arange(0, BLOCK)[None, :, None]
    g = tl.arange(0, ROWS)[:, None, None]
    k_ahead = tl.load(keys + t * SIZE + d, mask=(t < end) & (d < SIZE), other=0.0)
    v_ahead = tl.load(values + t * SIZE + d, mask=(t < end) & (d < SIZE), other=0.0)

    others_may_begin_and_i_wait(OVERLAPS)
    heads: tl.constexpr = KV_HEADS * GROUP
    own = qkv + row * (heads + 2 * KV_HEADS) * SIZE
    cos += row * SIZE
    sin += row * SIZE
    in_group = (g < GROUP) & (d < SIZE)
    q_at = (head * GROUP + g) * SIZE
    q = _head(own, cos, sin, q_norm, eps, q_at, d, in_group, SIZE, HAS_NORM, ROTATES)
    # Every place of a block keeps sums of its own, weighed against its own largest score, so that
    # nothing passes between threads until the end.
    most = tl.full((ROWS, BLOCK, 1), LEAST, tl.float32)
    weight = tl.zeros((ROWS, BLOCK, 1), tl.float32)
    total = tl.zeros((ROWS, BLOCK, WIDTH), tl.float32)
    for block in range(begin, end, BLOCK):
        t = block + tl.arange(0, BLOCK)[None, :, None]
        k, v = k_ahead.to(tl.float32), v_ahead.to(tl.float32)
        later = t + BLOCK
        k_ahead = tl.load(keys + later * SIZE + d, mask=(later < end) & (d < SIZE), other=0.0)
        v_ahead = tl.load(values + later * SIZE + d, mask=(later < end) & (d < SIZE), other=0.0)
        s = _scores(q, k, scale, softcap, HAS_SOFTCAP)
        s = tl.where(t < end, s, LEAST)
        new = tl.maximum(most, s)
        p = tl.where(t < end, tl.exp2((s - new) * LOG2_E), 0.0)
        shrink = tl.exp2((most - new) * LOG2_E)
        weight = weight * shrink + p
        total = total * shrink + p * v
        most = new
    highest = tl.max(most, axis=1, keep_dims=True)
    share_of = tl.exp2((most - highest) * LOG2_E)
    weight = tl.sum(weight * share_of, axis=1, keep_dims=True)
    total = tl.sum(total * share_of, axis=1, keep_dims=True)
    if split == SPLITS - 1:
        one = tl.zeros((1, 1, 1), tl.int32)
        k_at = (heads + head + one) * SIZE
        inside = d < SIZE
        k_new = _head(own, cos, sin, k_norm, eps, k_at, d, inside, SIZE, HAS_NORM, ROTATES)
        k_new = k_new.to(DTYPE)
        v_new = tl.load(own + (heads + KV_HEADS + head) * SIZE + d, mask=inside, other=0.0)
        to = start.to(tl.int64) * SIZE + d
        tl.store(keys + to, k_new, mask=inside)
        tl.store(values + to, v_new, mask=inside)
        s = _scores(q, k_new.to(tl.float32), scale, softcap, HAS_SOFTCAP)
        new = tl.maximum(highest, s)
        p = tl.exp2((s - new) * LOG2_E)
        shrink = tl.exp2((highest - new) * LOG2_E)
        weight = weight * shrink + p
        total = total * shrink + p * v_new.to(tl.float32)
        highest = new
    unit = (row * heads + head * GROUP + g) * SPLITS + split
    tl.store(sums + unit * SIZE + d, total, mask=in_group)
    tl.store(weights + unit, weight, mask=g < GROUP)
    tl.store(largest + unit, highest, mask=g < GROUP)


@triton.jit
def _combine(
    sums,
    weights,
    largest,
    out,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    unit = tl.program_id(0)
    d, split = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    there = split < SPLITS
    others_may_begin_and_i_wait(OVERLAPS)
    most = tl.load(largest + unit * SPLITS + split, mask=there, other=float("-inf"))
    share = tl.exp2((most - tl.max(most, axis=0)) * LOG2_E)
    weight = tl.load(weights + unit * SPLITS + split, mask=there, other=0.0)
    part = tl.load(
        sums + (unit * SPLITS + split)[:, None] * SIZE + d[None, :],
        mask=there[:, None] & (d < SIZE)[None, :],
        other=0.0,
    )
    y = tl.sum(part * share[:, None], axis=0) / tl.sum(share * weight, axis=0)
    tl.store(out + unit * SIZE + d, y.to(out.dtype.element_ty), mask=d < SIZE)


def attend_caches(
    qkv: Tensor,
    heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor, float] | None,
    caches: DeviceCaches,
    layer: int,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    how: Plan,
) -> Tensor:
    """Normalizes and rotates queries and keys, puts keys and values into the caches, and attends.

    Args:
        qkv: [N, H + 2 · kv_heads, head_dim], bfloat16 or float16, contiguous.
        heads: H.
        rotation: factors [N, 1, head_dim] as of ``attention.rotation``; None for no rotation.
        norms: RMSNorm weights [head_dim] float32 of queries and of keys, and eps; or None.
        window: tokens a query sees, itself included; None for no limit.
        scale, softcap: as in ``attention.attend``.
        how: the work is cut up.

    Returns:
        [N, H · head_dim].
    """
    rows, all_heads, size = qkv.shape
    kv_heads = (all_heads - heads) // 2
    splits = how.splits
    units = rows, heads, splits
    sums = torch.empty((*units, size), dtype=torch.float32, device=qkv.device)
    weights = torch.empty(units, dtype=torch.float32, device=qkv.device)
    largest = torch.empty_like(weights)
    out = torch.empty((rows, heads * size), dtype=qkv.dtype, device=qkv.device)
    cos, sin = rotation or (qkv, qkv)
    width = triton.next_power_of_2(size)
    _attend[(splits, kv_heads, rows)](
        qkv,
        cos,
        sin,
        norms[0] if norms else None,
        norms[1] if norms else None,
        caches.addresses[layer],
        caches.starts,
        caches.capacities,
        sums,
        weights,
        largest,
        norms[2] if norms else 0.0,
        scale,
        softcap or 0.0,
        window or 0,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        SIZE=size,
        ROWS=triton.next_power_of_2(heads // kv_heads),
        WIDTH=width,
        SPLITS=splits,
        BLOCK=how.block,
        DTYPE=_DTYPES[qkv.dtype],
        ROTATES=rotation is not None,
        HAS_NORM=norms is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        **overlap(),
        num_warps=4,
        num_stages=1,
    )
    _combine[(rows * heads,)](
        sums,
        weights,
        largest,
        out,
        SIZE=size,
        WIDTH=width,
        SPLITS=splits,
        PADDED=triton.next_power_of_2(splits),
        **overlap(),
        num_warps=2,
    )
    return out
