"""Attention for a few new tokens of each sequence over its own slots of the KV pool.

The location and the length of a sequence are read from tensors, so that a captured graph can be
replayed with other values. A row's cached tokens are split among programs. The last of them also
takes the new tokens of the row's sequence, up to the row's own, from the batch: it normalizes and
rotates their keys again, so that no program waits for another, and stores the row's own key and
value. Scores and sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.cuda.tuning import TRITON_DTYPES, pdl_options, pdl_wait

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e30)
"""A number below every score. It is finite, since infinity minus infinity is NaN."""
MAX_SPLITS = 32


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """The split-KV plan of attention.

    Args:
        splits: number of programs that share the cached tokens of a row and a key head.
        block: number of cached tokens that a program reads at once.
    """

    splits: int
    block: int


def split_plan(rows: int, heads: int, kv_heads: int, size: int, programs: int) -> SplitPlan:
    """Returns the plan for a number of rows. It does not depend on sequence lengths, because a
    captured graph is replayed while lengths grow.

    Args:
        size: head_dim.
        programs: how many programs the device runs at once.
    """
    splits = max(1, min(MAX_SPLITS, programs // (rows * kv_heads)))
    # The sums of a block take most of the registers.
    block = 8192 // (triton.next_power_of_2(heads // kv_heads) * triton.next_power_of_2(size))
    return SplitPlan(splits=splits, block=max(4, block))


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
    """Loads heads [rows, 1, SIZE] from x + at, normalized and rotated."""
    other_half = (d + SIZE // 2) % SIZE
    inside = d < SIZE
    v = tl.load(x + at + d, mask=mask, other=0.0).to(tl.float32)
    w = v
    if ROTATES:
        w = tl.load(x + at + other_half, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(v * v, axis=2, keep_dims=True) / SIZE + eps)
        v *= factor * tl.load(norm + d, mask=inside, other=0.0)
        w *= factor * tl.load(norm + other_half, mask=inside, other=0.0)
    if ROTATES:
        c = tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)
        v = v * c + w * s
    return v


@triton.jit
def _scores(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Returns the scores [rows, T, 1] of q [rows, 1, SIZE] and k [1, T, SIZE]."""
    s = tl.sum(q * k, axis=2, keep_dims=True) * scale
    if HAS_SOFTCAP:
        s = softcap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2_E) / softcap) + 1.0))
    return s


@triton.jit
def _attend(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    kv,
    first_slots,
    cached,
    positions,
    sums,
    weights,
    largest,
    eps,
    scale,
    softcap,
    window,
    slots,
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
    start = tl.load(cached + row).to(tl.int32)
    position = tl.load(positions + row).to(tl.int32)
    first_slot = tl.load(first_slots + row)
    keys = kv + (head.to(tl.int64) * slots + first_slot) * SIZE
    values = keys + KV_HEADS * tl.cast(slots, tl.int64) * SIZE  # slots may be a constant 1
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(0, position + 1 - window)
    in_pool = tl.maximum(0, start - first)
    share = tl.cdiv(tl.cdiv(in_pool, SPLITS), BLOCK) * BLOCK
    begin = first + split * share
    end = tl.minimum(begin + share, start)
    d = tl.arange(0, WIDTH)[None, None, :]
    t = begin + tl.arange(0, BLOCK)[None, :, None]
    g = tl.arange(0, ROWS)[:, None, None]
    k_ahead = tl.load(keys + t * SIZE + d, mask=(t < end) & (d < SIZE), other=0.0)
    v_ahead = tl.load(values + t * SIZE + d, mask=(t < end) & (d < SIZE), other=0.0)

    pdl_wait(OVERLAPS)
    heads: tl.constexpr = KV_HEADS * GROUP
    width: tl.constexpr = (heads + 2 * KV_HEADS) * SIZE
    own = qkv + row * width
    in_group = (g < GROUP) & (d < SIZE)
    q_at = (head * GROUP + g) * SIZE
    turn = row * SIZE
    q = _head(own, cos + turn, sin + turn, q_norm, eps, q_at, d, in_group, SIZE, HAS_NORM, ROTATES)
    # Every token position of a block keeps its own sums, relative to its own largest score, so that
    # threads exchange nothing until the end.
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
        new_tokens = position - start  # new tokens before the row's own
        for ahead in range(tl.maximum(0, first - start), new_tokens):
            of = row - new_tokens + ahead
            other = qkv + of * width
            c_other, s_other = cos + of * SIZE, sin + of * SIZE
            k_other = _head(
                other, c_other, s_other, k_norm, eps, k_at, d, inside, SIZE, HAS_NORM, ROTATES
            ).to(DTYPE)
            v_at = (heads + KV_HEADS + head) * SIZE + d
            v_other = tl.load(other + v_at, mask=inside, other=0.0).to(tl.float32)
            score = _scores(q, k_other.to(tl.float32), scale, softcap, HAS_SOFTCAP)
            above = tl.maximum(highest, score)
            weight_other = tl.exp2((score - above) * LOG2_E)
            fade = tl.exp2((highest - above) * LOG2_E)
            weight = weight * fade + weight_other
            total = total * fade + weight_other * v_other
            highest = above
        k_new = _head(
            own, cos + turn, sin + turn, k_norm, eps, k_at, d, inside, SIZE, HAS_NORM, ROTATES
        ).to(DTYPE)
        v_new = tl.load(own + (heads + KV_HEADS + head) * SIZE + d, mask=inside, other=0.0)
        to = position.to(tl.int64) * SIZE + d
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
    pdl_wait(OVERLAPS)
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


def attend_rows(
    qkv: Tensor,
    heads: int,
    rope: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor, float] | None,
    kv: Tensor,
    first_slots: Tensor,
    cached: Tensor,
    positions: Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    plan: SplitPlan,
) -> Tensor:
    """Normalizes and rotates queries and keys, stores keys and values, and attends over all tokens
    up to each row's own.

    Args:
        qkv: [N, H + 2 · kv_heads, head_dim], bfloat16 or float16, contiguous.
        heads: H.
        rope: factors [N, 1, head_dim] from ``attention.rope_factors``; None for no rotation.
        norms: RMSNorm weights [head_dim] float32 for queries and for keys, and eps; or None.
        kv: [2, kv_heads, slots, head_dim], one layer of the pool, of qkv's dtype.
        first_slots: [N] int64, the KV slot of the first token of each row's sequence.
        cached: [N] int64, the number of tokens of the row's sequence that the pool holds.
        positions: [N] int64, each row's position in its sequence. The rows before it hold the
            sequence's tokens from position ``cached`` on.
        window: number of tokens that a query sees, its own included; None for no limit.
        scale, softcap: as in ``attention.attend``.

    Returns:
        [N, H · head_dim].
    """
    rows, all_heads, size = qkv.shape
    kv_heads = (all_heads - heads) // 2
    splits = plan.splits
    units = rows, heads, splits
    sums = torch.empty((*units, size), dtype=torch.float32, device=qkv.device)
    weights = torch.empty(units, dtype=torch.float32, device=qkv.device)
    largest = torch.empty_like(weights)
    out = torch.empty((rows, heads * size), dtype=qkv.dtype, device=qkv.device)
    cos, sin = rope or (qkv, qkv)
    width = triton.next_power_of_2(size)
    _attend[(splits, kv_heads, rows)](
        qkv,
        cos,
        sin,
        norms[0] if norms else None,
        norms[1] if norms else None,
        kv,
        first_slots,
        cached,
        positions,
        sums,
        weights,
        largest,
        norms[2] if norms else 0.0,
        scale,
        softcap or 0.0,
        window or 0,
        kv.shape[2],
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        SIZE=size,
        ROWS=triton.next_power_of_2(heads // kv_heads),
        WIDTH=width,
        SPLITS=splits,
        BLOCK=plan.block,
        DTYPE=TRITON_DTYPES[qkv.dtype],
        ROTATES=rope is not None,
        HAS_NORM=norms is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None,
        **pdl_options(),
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
        **pdl_options(),
        num_warps=2,
    )
    return out
