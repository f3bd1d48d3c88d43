"""The decoder: one definition for prefill and decode, all families, dense or on experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.kv_cache import KvCache
from griffin_core.model.attention import (
    Visible,
    apply_rotary,
    attend,
    rotary_tables,
    visible_tokens,
)
from griffin_core.model.feedforward import FeedForward
from griffin_core.model.spec import ModelSpec

RunFF = Callable[[Tensor], Tensor]
"""[T, D] -> [T, D]: what a layer runs as its FF block: the dense one, one that also takes the
statistic, or a slim view."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm (no bias) or LayerNorm over the last dimension, in float32.

    Args:
        weight: float32, any offset of the family already added; None for all ones.
    """

    kind: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        shape = x.shape[-1:]
        if self.kind == "rms":
            return F.rms_norm(x.float(), shape, self.weight, self.eps).to(x.dtype)
        return F.layer_norm(x.float(), shape, self.weight, self.bias, self.eps).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Weights of one decoder layer. The optional norms are there if the family has them."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    ff: FeedForward
    attention_norm: Norm
    ff_norm: Norm
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attention_out_norm: Norm | None = None
    ff_out_norm: Norm | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """Everything that is loaded.

    Args:
        embedding: [V, embed width].
        head: [V, embed width]; the embedding itself where the model ties them.
        positions: learned position table, or None.
        project_in, project_out: between embedding width and D (OPT-350m), or None.
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Tensor
    positions: Tensor | None = None
    project_in: Tensor | None = None
    project_out: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TokenRun:
    """Consecutive tokens on their way through the layers: what all layers share.

    Args:
        start: position of the first; everything before it is in the cache.
        rotary: cos and sin of each kind of rotary positions, as in ``ModelSpec.rotaries``.
        visible: what the tokens see, by the layer's window.
    """

    start: int
    tokens: int
    rotary: tuple[tuple[Tensor, Tensor], ...]
    visible: dict[int | None, Visible]


class Decoder:
    """A model ready to run. Holds weights and no state of any request.

    Args:
        spec: its shape.
        weights: of one dtype, on one device.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self.layers = weights.layers
        self._weights = weights
        self._windows = {s.window for s in spec.layers}

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self._weights.embedding.device

    def new_cache(self, capacity: int) -> KvCache:
        """An empty cache for that many tokens."""
        return KvCache(self.spec, capacity, dtype=self.dtype, device=self.device)

    def begin(self, token_ids: Tensor, start: int) -> tuple[Tensor, TokenRun]:
        """Token ids [T] int64 at positions start.. -> embeddings [T, D] and what layers share."""
        w = self._weights
        tokens = token_ids.shape[0]
        positions = torch.arange(start, start + tokens, device=self.device)
        x = F.embedding(token_ids, w.embedding)
        if self.spec.embed_scale != 1.0:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype)
        if w.project_in is not None:
            x = F.linear(x, w.project_in)
        if w.positions is not None:
            x = x + w.positions[positions + self.spec.position_offset]
        run = TokenRun(
            start=start,
            tokens=tokens,
            rotary=tuple(rotary_tables(r, positions, self.dtype) for r in self.spec.rotaries),
            visible={n: visible_tokens(start, tokens, n, self.device) for n in self._windows},
        )
        return x, run

    def layer(self, index: int, x: Tensor, run: TokenRun, cache: KvCache, ff: RunFF) -> Tensor:
        """x [T, D] through layer ``index``; writes its keys and values into the cache."""
        w = self.layers[index]
        before = self.spec.norm_before
        attention = self._attention(index, w.attention_norm(x) if before else x, run, cache)
        if w.attention_out_norm is not None:
            attention = w.attention_out_norm(attention)
        x = x + attention
        if not before:
            x = w.attention_norm(x)
        out = ff(w.ff_norm(x) if before else x)
        if w.ff_out_norm is not None:
            out = w.ff_out_norm(out)
        x = x + out
        return x if before else w.ff_norm(x)

    def _attention(self, index: int, x: Tensor, run: TokenRun, cache: KvCache) -> Tensor:
        w, spec, layer = self.layers[index], self.spec, self.spec.layers[index]
        q = w.q(x).view(run.tokens, spec.heads, spec.head_dim)
        k = w.k(x).view(run.tokens, spec.kv_heads, spec.head_dim)
        v = w.v(x).view(run.tokens, spec.kv_heads, spec.head_dim)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = w.q_norm(q), w.k_norm(k)
        if layer.rotary is not None:
            cos, sin = run.rotary[layer.rotary]
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        keys, values = cache.write(index, run.start, k, v)
        visible = run.visible[layer.window]
        out = attend(q, keys, values, visible, spec.query_scale, spec.attention_softcap)
        return w.o(out)

    def final_hidden(self, x: Tensor) -> Tensor:
        """Output of the last layer [T, D] -> what the head reads [T, D]."""
        norm = self._weights.final_norm
        return x if norm is None else norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Final hidden state [T, D] -> logits [T, V] float32."""
        w = self._weights
        if w.project_out is not None:
            hidden = F.linear(hidden, w.project_out)
        logits = F.linear(hidden, w.head).float()
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
