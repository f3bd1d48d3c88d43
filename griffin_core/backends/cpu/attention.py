"""Attention for a few new tokens of each sequence over its own slots of the pool, all in one call.

On a CPU, torch's attention over several lengths pads them all to the longest. All tensors
are bfloat16 on the CPU and contiguous; scores and sums are float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from griffin_core.backends.cpu.arithmetic import exp
from griffin_core.backends.cpu.bfloat16 import at, float_of, narrow, widen
from griffin_core.backends.cpu.team import (
    FAST,
    Kernel,
    address,
    team_barrier,
    team_rank,
    team_size,
)
from griffin_core.backends.cpu.vectors import BLOCK_WIDTH, gather_loop, place, score_loop
from griffin_core.backends.transfers import float_bits

BLOCK = 128
"""The number of cached tokens whose scores are held at once."""


def _plain_score_loop(size: int, group: int) -> Any:
    """Does the same as ``score_loop`` for heads of any size, four times slower."""

    @njit(fastmath=FAST)
    def score(keys, q, count, scores):
        query, to = at(q, types.float32), at(scores, types.float32)
        for j in range(count):
            key = at(keys + 2 * j * size, types.uint16)
            for g in range(group):
                total = np.float32(0.0)
                for i in range(size):
                    total += widen(key[i]) * query[g * size + i]
                to[g * BLOCK + j] = total

    return score


def _plain_gather_loop(size: int, group: int) -> Any:
    """Does the same as ``gather_loop`` for heads of any size."""

    @njit(fastmath=FAST)
    def gather(totals, values, count, scores):
        weights = at(scores, types.float32)
        for j in range(count):
            value = at(values + 2 * j * size, types.uint16)
            for g in range(group):
                total = at(totals + 4 * g * size, types.float32)
                weight = weights[g * BLOCK + j]
                for i in range(size):
                    total[i] += widen(value[i]) * weight

    return gather


@cache
def attend_kernel(size: int, group: int) -> Kernel:
    """Returns the kernel for heads of ``size`` elements and ``group`` query heads per key head.
    Compiled with both as constants, it keeps a group's queries and sums in registers and is 1.7
    times faster."""

    @njit(inline="always")
    def rotated(x, cos, sin, i):
        """Returns element i of a head after rotation; see ``attention.apply_rope``."""
        other = i + size // 2 if i < size // 2 else i - size // 2
        return widen(x[i]) * widen(cos[i]) + widen(x[other]) * widen(sin[i])

    if size % BLOCK_WIDTH == 0:
        position = place
        score = score_loop(size, group, BLOCK)
        gather = gather_loop(size, group, BLOCK)
    else:
        position = njit(lambda i: i, inline="always")
        score = _plain_score_loop(size, group)
        gather = _plain_gather_loop(size, group)

    @njit(fastmath=FAST)
    def cap(scores, count, softcap):
        """Applies cap · tanh(s / cap) to the scores, computed from e^x."""
        for j in range(count):
            s = scores[j]
            inner = exp(np.float32(-2.0) * abs(s / softcap))
            scores[j] = np.copysign(
                softcap * (np.float32(1.0) - inner) / (np.float32(1.0) + inner), s
            )

    @njit(fastmath=FAST)
    def largest_of(scores, count, largest):
        for j in range(count):
            largest = max(largest, scores[j])
        return largest

    @njit(fastmath=FAST)
    def weigh(scores, count, largest):
        """Turns scores into e^(score - largest), and returns their sum."""
        weight = np.float32(0.0)
        for j in range(count):
            scores[j] = exp(scores[j] - largest)
        for j in range(count):
            weight += scores[j]
        return weight

    def attend(a):
        first_slots, positions = at(a[5], types.int64), at(a[6], types.int64)
        slots = a[14]
        rows, kv_heads, window, parts = a[8], a[9], a[10], a[11]
        scale, softcap = float_of(types.int32(a[12])), float_of(types.int32(a[13]))
        heads, rotates, head_bytes = group * kv_heads, a[2] != 0, 2 * size
        row_bytes = (heads + 2 * kv_heads) * head_bytes
        for unit in range(team_rank(), rows * kv_heads, team_size()):
            row, head = unit // kv_heads, unit % kv_heads
            cos = at(a[2] + row * head_bytes, types.uint16)
            sin = at(a[3] + row * head_bytes, types.uint16)
            source = a[0] + row * row_bytes + (heads + head) * head_bytes
            target = a[4] + (head * slots + first_slots[row] + positions[row]) * head_bytes
            new_key, key = at(source, types.uint16), at(target, types.uint16)
            new_value = at(source + kv_heads * head_bytes, types.uint16)
            value = at(target + kv_heads * slots * head_bytes, types.uint16)
            for i in range(size):
                key[i] = narrow(rotated(new_key, cos, sin, i)) if rotates else new_key[i]
                value[i] = new_value[i]
        team_barrier()
        # Each thread takes some parts of some caches and leaves, for each group of heads, its sums,
        # weights and largest scores.
        own = a[7] + 4 * team_rank() * group * (size + BLOCK)
        q, scores = at(own, types.float32), own + 4 * group * size
        sums = a[7] + 4 * team_size() * group * (size + BLOCK)
        for unit in range(team_rank(), rows * kv_heads * parts, team_size()):
            row, head, part = unit // parts // kv_heads, unit // parts % kv_heads, unit % parts
            cos = at(a[2] + row * head_bytes, types.uint16)
            sin = at(a[3] + row * head_bytes, types.uint16)
            totals = sums + 4 * unit * group * (size + 2)
            total = at(totals, types.float32)
            weights = at(totals + 4 * group * size, types.float32)
            largest = at(totals + 4 * group * (size + 1), types.float32)
            for g in range(group):
                query = at(a[0] + row * row_bytes + (head * group + g) * head_bytes, types.uint16)
                for i in range(size):
                    x = rotated(query, cos, sin, i) if rotates else widen(query[i])
                    q[g * size + position(i)] = x * scale
                    total[g * size + i] = np.float32(0.0)
                weights[g], largest[g] = np.float32(0.0), np.float32(-1e30)
            first = max(0, positions[row] + 1 - window) if window > 0 else 0
            seen = positions[row] + 1 - first
            keys = a[4] + (head * slots + first_slots[row]) * head_bytes
            values = keys + kv_heads * slots * head_bytes
            end = first + seen * (part + 1) // parts
            for block in range(first + seen * part // parts, end, BLOCK):
                count = min(BLOCK, end - block)
                score(keys + block * head_bytes, own, count, scores)
                for g in range(group):
                    of_head = at(own + 4 * (group * size + g * BLOCK), types.float32)
                    if softcap > np.float32(0.0):
                        cap(of_head, count, softcap)
                    new = largest_of(of_head, count, largest[g])
                    shrink = exp(largest[g] - new)
                    largest[g] = new
                    weights[g] = weights[g] * shrink + weigh(of_head, count, new)
                    for i in range(size):
                        total[g * size + i] *= shrink
                gather(totals, values + block * head_bytes, count, scores)
        team_barrier()
        for unit in range(team_rank(), rows * heads, team_size()):
            group_sums = sums + 4 * (unit // group) * parts * group * (size + 2)
            g = unit % group
            most = np.float32(-1e30)
            for part in range(parts):
                of_part = at(group_sums + 4 * part * group * (size + 2), types.float32)
                most = max(most, of_part[group * (size + 1) + g])
            x = at(own, types.float32)
            for i in range(size):
                x[i] = np.float32(0.0)
            weight = np.float32(0.0)
            for part in range(parts):
                of_part = at(group_sums + 4 * part * group * (size + 2), types.float32)
                share = exp(of_part[group * (size + 1) + g] - most)
                weight += share * of_part[group * size + g]
                for i in range(size):
                    x[i] += share * of_part[g * size + i]
            out = at(a[1] + unit * head_bytes, types.uint16)
            for i in range(size):
                out[i] = narrow(x[position(i)] / weight)

    return Kernel(attend)


def attend_rows(
    qkv: Tensor,
    heads: int,
    rope: tuple[Tensor, Tensor] | None,
    kv: Tensor,
    first_slots: Tensor,
    positions: Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Rotates queries and keys, stores keys and values, and lets each row attend over its sequence
    up to itself.

    Args:
        qkv: [N, H + 2 · kv_heads, head_dim].
        heads: H.
        rope: factors [N, 1, head_dim] from ``attention.rope_factors``; None for no rotation.
        kv: [2, kv_heads, slots, head_dim], one layer of the pool.
        first_slots: [N] int64, the KV slot of the first token of each row's sequence.
        positions: [N] int64, each row's position in its sequence. The keys and values before it
            are in the pool, or belong to other rows.
        window: number of tokens that a query sees, its own included; None for no limit.
        scale, softcap: as in ``attention.attend``.

    Returns:
        [N, H · head_dim].
    """
    rows, all_heads, size = qkv.shape
    kv_heads = (all_heads - heads) // 2
    group, threads = heads // kv_heads, torch.get_num_threads()
    # If there are few caches, they are split into parts, so that every thread has work.
    parts = max(1, -(-2 * threads // (rows * kv_heads)))
    out = qkv.new_empty((rows, heads * size))
    scratch = torch.empty(
        threads * group * (size + BLOCK) + rows * kv_heads * parts * group * (size + 2),
        dtype=torch.float32,
    )
    cos, sin = rope or (None, None)
    attend_kernel(size, group)(
        qkv.data_ptr(),
        out.data_ptr(),
        address(cos),
        address(sin),
        kv.data_ptr(),
        first_slots.data_ptr(),
        positions.data_ptr(),
        scratch.data_ptr(),
        rows,
        kv_heads,
        window or 0,
        parts,
        float_bits(scale),
        float_bits(softcap or 0.0),
        kv.shape[2],
    )
    return out
