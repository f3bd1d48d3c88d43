"""A decoder's weights, laid out by a backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from griffin_core.backends.base import FeedForward, Linear
from griffin_core.spec.weights import Norm


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Weights of one decoder layer. The optional norms are there if the family has them.

    Args:
        qkv: to queries, keys and values, one below the other.
        o: from the heads' outputs back to D.
        ff: the FF block on all neurons.
        attention_norm, ff_norm: before attention and FF, or after the residual add
            (``ModelSpec.norm_before``).
        q_norm, k_norm: of each head of queries and keys.
        attention_out_norm, ff_out_norm: of what attention and FF give, before it is added.
    """

    qkv: Linear
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
        head: to V logits.
        positions: learned position table, or None.
        project_in, project_out: between embedding width and D (OPT-350m), or None.
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Linear
    positions: Tensor | None = None
    project_in: Tensor | None = None
    project_out: Tensor | None = None
