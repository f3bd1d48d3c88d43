"""A decoder's weights, laid out by a backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from griffin_core.backends.base import FeedForward, Linear
from griffin_core.spec.weights import Norm


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The weights of one decoder layer. Norms that the family does not have are None.

    Args:
        qkv: the projection to queries, keys and values, concatenated.
        o: the output projection from the heads back to D.
        ff: the FF block on all neurons.
        attention_norm, ff_norm: the norms before attention and FF, or after the residual add
            (``ModelSpec.norm_before``).
        q_norm, k_norm: the norms of each query and key head.
        attention_out_norm, ff_out_norm: the norms of the outputs of attention and FF, before the
            residual add.
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
    """All weights of a decoder.

    Args:
        embedding: [V, embedding_size].
        head: the projection to V logits.
        positions: the table of learned positions, or None.
        project_in, project_out: the projections between embedding_size and D (OPT-350m), or None.
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Linear
    positions: Tensor | None = None
    project_in: Tensor | None = None
    project_out: Tensor | None = None
