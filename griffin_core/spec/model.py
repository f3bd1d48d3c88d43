"""The shape of a decoder: its sizes, its layers, and the variants that it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from griffin_core.spec.rope import RotarySpec

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The properties that differ from layer to layer.

    Args:
        window: number of tokens that a query sees, its own included; None for no limit.
        rotary: index into ``ModelSpec.rotaries``; None for learned positions.
    """

    window: int | None
    rotary: int | None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder's shape and its variants. Dimension letters are the project's (docs/structure.md).

    Args:
        layers: a LayerSpec for each of the L layers.
        rotaries: the kinds of rotary positions that the layers use.
        hidden_size: D, the hidden size.
        intermediate_size: F, the intermediate size.
        num_heads: H, the number of query heads; a multiple of num_kv_heads.
        embedding_size: that of the embedding; differs from D in OPT-350m only.
        norm_before: whether layers normalize before attention and FF (True) or after the residual
            add (False).
        norm_offset: added to RMSNorm weights (1 in Gemma).
        sandwich_norms: whether the outputs of attention and FF are normalized too (Gemma 2 and 3).
        final_norm: whether a norm precedes the head.
        query_scale: the factor on q·k.
        attention_softcap: attention scores s become cap * tanh(s / cap); None for no soft cap.
        logit_softcap: the same for logits.
        embed_scale: the factor on embeddings.
        position_offset: rows skipped at the start of a learned position table (2 in OPT).
    """

    family: str
    layers: tuple[LayerSpec, ...]
    rotaries: tuple[RotarySpec, ...] = ()
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    embedding_size: int
    norm: NormKind
    norm_eps: float
    norm_before: bool = True
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    query_key_norm: bool = False
    final_norm: bool = True
    activation: Activation
    gated: bool
    query_scale: float
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    position_offset: int = 0
