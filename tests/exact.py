"""What several tests compare with, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Of the last of S tokens: q [H, head_dim], keys and values [kv_heads, S, head_dim] ->
    [H · head_dim]."""
    heads, tokens = q.shape[0], keys.shape[1]
    group = heads // keys.shape[0]
    scores = torch.einsum("hd,hsd->hs", q, keys.repeat_interleave(group, 0)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if window is not None:
        scores[:, : max(0, tokens - window)] = -math.inf
    weights = scores.softmax(dim=1)
    return torch.einsum("hs,hsd->hd", weights, values.repeat_interleave(group, 0)).flatten()
