"""Attention of new tokens over cached ones, and rotary positions, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right

from griffin_core.spec.model import ModelSpec
from griffin_core.spec.rope import RotarySpec

Rope = tuple[Tensor, Tensor]
"""The factors of ``apply_rope`` for N positions, two tensors [N, 1, head_dim]: cos, and sin, which
is negated in the first half of a head."""


def rope_factors(spec: RotarySpec, positions: Tensor, dtype: torch.dtype) -> Rope:
    """Returns the factors for positions [N]."""
    angles = positions[:, None].float() * _frequencies(spec, positions.device)
    cos, sin = angles.cos() * spec.scale, angles.sin() * spec.scale
    return torch.cat((cos, cos), 1)[:, None].to(dtype), torch.cat((-sin, sin), 1)[:, None].to(dtype)


def ropes_of(spec: ModelSpec, positions: Tensor, dtype: torch.dtype) -> tuple[Rope, ...]:
    """The factors for positions [N], one for each of ``spec.rotaries``."""
    return tuple(rope_factors(rotary, positions, dtype) for rotary in spec.rotaries)


@cache
def _frequencies(spec: RotarySpec, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # also used outside inference mode
        return torch.tensor(spec.inverse_frequencies, device=device)


def apply_rope(x: Tensor, rope: Rope) -> None:
    """Rotates pairs (i, i + head_dim / 2) of x [N, heads, head_dim] in place, in the layout of
    Hugging Face checkpoints."""
    cos, sin = rope
    other_half = x.roll(x.shape[-1] // 2, -1).mul_(sin)
    x.mul_(cos).add_(other_half)


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """The attention mask: which cached tokens each new token sees.

    Args:
        first: index of the first cached token that any new token sees; earlier ones are skipped.
        causal: whether the cache holds only the new tokens, each of which sees those up to itself.
        mask: [T, S - first] bool, True where a token is seen; None if ``causal`` or ``shifted`` is
            set, or if every new token sees all of them.
        shifted: on a GPU, the causal mask for new tokens after cached ones, in a form for which
            torch has a fused kernel. For a mask tensor it has none that also takes grouped heads.
    """

    first: int
    causal: bool
    mask: Tensor | None
    shifted: CausalBias | None = None


def attention_mask(
    start: int, count: int, window: int | None, device: torch.device
) -> AttentionMask:
    """Returns the causal mask for ``count`` new tokens at positions start, start + 1, ...

    Args:
        window: number of tokens that a query sees, its own included; None for no limit.
    """
    end = start + count
    first = 0 if window is None else max(0, start - window + 1)
    if count == 1:
        return AttentionMask(first=first, causal=False, mask=None)
    if start == 0 and (window is None or window >= end):
        return AttentionMask(first=0, causal=True, mask=None)
    if device.type == "cuda" and first == 0 and (window is None or window >= end):
        return AttentionMask(
            first=0, causal=False, mask=None, shifted=causal_lower_right(count, end)
        )
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(first, end, device=device)[None, :]
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    return AttentionMask(first=first, causal=False, mask=mask)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None
) -> Tensor:
    """Softmax attention with grouped heads.

    Args:
        q: [T, H, head_dim], the new tokens.
        k, v: [kv_heads, S, head_dim], all tokens so far, the new ones last.
        scale: the factor on q·k.
        softcap: s -> cap * tanh(s / cap) on the scaled scores.

    Returns:
        [T, H * head_dim].
    """
    tokens, heads, head_dim = q.shape
    if mask.first:
        k, v = k[:, mask.first :], v[:, mask.first :]
    if softcap is None and tokens == 1:
        # The heads of a group read the same keys, so they are passed as the rows of one head: with
        # enable_gqa torch's CPU kernel reads the keys once per head, which in bfloat16 is four
        # times slower (docs/LOG.md).
        rows = q.view(1, k.shape[0], -1, head_dim)
        out = F.scaled_dot_product_attention(rows, k[None], v[None], scale=scale)
        return out.reshape(1, -1)
    q = q.transpose(0, 1)
    group = heads // k.shape[0]
    # On a GPU only the form without a mask takes grouped heads in a fused kernel.
    if softcap is not None or (mask.mask is not None and k.is_cuda):
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    if softcap is None:
        out = F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=mask.mask if mask.shifted is None else mask.shifted,
            is_causal=mask.causal,
            scale=scale,
            enable_gqa=k.shape[0] != heads,
        )[0]
    else:  # torch has no fused kernel with a soft cap
        scores = softcap * torch.tanh((q @ k.transpose(1, 2)) * scale / softcap)
        seen = mask.mask
        if mask.causal or mask.shifted is not None:
            seen = torch.ones(tokens, k.shape[1], dtype=torch.bool, device=q.device)
            seen = seen.tril(k.shape[1] - tokens)
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        out = scores.float().softmax(dim=-1).to(v.dtype) @ v
    return out.transpose(0, 1).reshape(tokens, -1)
