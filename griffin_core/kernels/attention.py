"""Attention of one new token of each session over what its own cache holds, all in one call.

torch's CPU has no attention over many lengths that does not pad them to the longest. All tensors
are bfloat16 on the CPU and contiguous; scores and sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from griffin_core.kernels.arithmetic import add, dot, exp
from griffin_core.kernels.bfloat16 import at, float_of, narrow, widen
from griffin_core.kernels.team import (
    FAST,
    Kernel,
    address,
    float_bits,
    team_barrier,
    team_rank,
    team_size,
)

BLOCK = 128
"""Cached tokens whose scores are held at once."""


@dataclass(frozen=True, kw_only=True)
class CacheTable:
    """Where the caches of a step's sessions lie.

    Args:
        layers: [L, N] int64, the address of each layer of each cache.
        starts: [N] int64, the position of each new token.
        capacities: [N] int64, tokens each cache has room for.
    """

    layers: Tensor
    starts: Tensor
    capacities: Tensor


def cache_table(caches: Sequence[tuple[Sequence[int], int, int]]) -> CacheTable:
    """From (addresses of the layers, start, capacity) of each cache.

    Raises:
        ValueError: a cache is full.
    """
    addresses, starts, capacities = zip(*caches, strict=True)
    if any(start >= capacity for _, start, capacity in caches):
        raise ValueError(f"a token at each of {starts} does not fit caches of {capacities}")
    return CacheTable(
        layers=torch.tensor(addresses).t().contiguous(),
        starts=torch.tensor(starts),
        capacities=torch.tensor(capacities),
    )


def attend_rows(
    qkv: Tensor,
    heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    table: CacheTable,
    layer: int,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Rotates queries and keys, puts keys and values into the caches, and attends.

    Args:
        qkv: [N, H + 2 · kv_heads, head_dim].
        heads: H.
        rotation: factors [N, 1, head_dim] as of ``attention.rotation``; None for no rotation.
        window: tokens a query sees, itself included; None for no limit.
        scale, softcap: as in ``attention.attend``.

    Returns:
        [N, H · head_dim].
    """
    rows, all_heads, head_dim = qkv.shape
    kv_heads = (all_heads - heads) // 2
    out = qkv.new_empty((rows, heads * head_dim))
    scratch = torch.empty(torch.get_num_threads() * (2 * head_dim + BLOCK))
    cos, sin = rotation or (None, None)
    _attend(
        qkv.data_ptr(),
        out.data_ptr(),
        address(cos),
        address(sin),
        table.layers.data_ptr() + 8 * rows * layer,
        table.starts.data_ptr(),
        table.capacities.data_ptr(),
        scratch.data_ptr(),
        rows,
        heads,
        kv_heads,
        head_dim,
        window or 0,
        float_bits(scale),
        float_bits(softcap or 0.0),
    )
    return out


@njit(inline="always")
def _rotated(x, cos, sin, i, size):
    """Element i of a head after rotation; see ``attention.rotate``."""
    other = i + size // 2 if i < size // 2 else i - size // 2
    return widen(x[i]) * widen(cos[i]) + widen(x[other]) * widen(sin[i])


@Kernel
def _attend(a):
    addresses, starts, capacities = (
        at(a[4], types.int64),
        at(a[5], types.int64),
        at(a[6], types.int64),
    )
    rows, heads, kv_heads, size, window = a[8], a[9], a[10], a[11], a[12]
    scale, softcap = float_of(types.int32(a[13])), float_of(types.int32(a[14]))
    rotates, head_bytes = a[2] != 0, 2 * size
    row_bytes = (heads + 2 * kv_heads) * head_bytes
    for unit in range(team_rank(), rows * kv_heads, team_size()):
        row, head = unit // kv_heads, unit % kv_heads
        cos = at(a[2] + row * head_bytes, types.uint16)
        sin = at(a[3] + row * head_bytes, types.uint16)
        source = a[0] + row * row_bytes + (heads + head) * head_bytes
        target = addresses[row] + (head * capacities[row] + starts[row]) * head_bytes
        new_key, key = at(source, types.uint16), at(target, types.uint16)
        new_value = at(source + kv_heads * head_bytes, types.uint16)
        value = at(target + kv_heads * capacities[row] * head_bytes, types.uint16)
        for i in range(size):
            key[i] = narrow(_rotated(new_key, cos, sin, i, size)) if rotates else new_key[i]
            value[i] = new_value[i]
    team_barrier()
    scratch = a[7] + 4 * team_rank() * (2 * size + BLOCK)
    q, total = at(scratch, types.float32), at(scratch + 4 * size, types.float32)
    scores = at(scratch + 8 * size, types.float32)
    for unit in range(team_rank(), rows * heads, team_size()):
        row, head = unit // heads, unit % heads
        cos = at(a[2] + row * head_bytes, types.uint16)
        sin = at(a[3] + row * head_bytes, types.uint16)
        query = at(a[0] + row * row_bytes + head * head_bytes, types.uint16)
        for i in range(size):
            x = _rotated(query, cos, sin, i, size) if rotates else widen(query[i])
            q[i] = x * scale
            total[i] = np.float32(0.0)
        end = starts[row] + 1
        keys = addresses[row] + head // (heads // kv_heads) * capacities[row] * head_bytes
        values = keys + kv_heads * capacities[row] * head_bytes
        begin = max(0, end - window) if window > 0 else 0
        weight = _weigh(q, keys, values, total, scores, begin, end, size, softcap)
        out = at(a[1] + unit * head_bytes, types.uint16)
        for i in range(size):
            out[i] = narrow(total[i] / weight)


@njit(fastmath=FAST)
def _weigh(q, keys, values, total, scores, begin, end, size, softcap):
    """total = Σ_j e^(score_j - m) · value_j over [begin, end); returns Σ_j e^(score_j - m). The
    largest score m so far grows block by block, and what is summed by then shrinks with it."""
    largest, weight = np.float32(-np.inf), np.float32(0.0)
    for block in range(begin, end, BLOCK):
        count = min(BLOCK, end - block)
        new = largest
        for j in range(count):
            score = dot(at(keys + 2 * (block + j) * size, types.uint16), q, size)
            if softcap > np.float32(0.0):
                # cap · tanh(s / cap), from e^x
                inner = exp(np.float32(-2.0) * abs(score / softcap))
                score = np.copysign(
                    softcap * (np.float32(1.0) - inner) / (np.float32(1.0) + inner), score
                )
            scores[j] = score
            new = max(new, score)
        shrink = exp(largest - new) if weight > np.float32(0.0) else np.float32(0.0)
        largest = new
        weight *= shrink
        for i in range(size):
            total[i] *= shrink
        for j in range(count):
            scores[j] = exp(scores[j] - largest)
        for j in range(count):
            weight += scores[j]
            add(total, at(values + 2 * (block + j) * size, types.uint16), scores[j], size)
    return weight
