"""OPT: learned positions, LayerNorms, and a plain FF with biases."""

from __future__ import annotations

from griffin_core.model.families.activations import ACTIVATIONS
from griffin_core.model.families.config_fields import ConfigReader, reject
from griffin_core.model.families.tensors import TensorReader
from griffin_core.model.weights import DecoderWeights, Layer
from griffin_core.spec.model import LayerSpec, ModelSpec


def opt_spec(c: ConfigReader) -> ModelSpec:
    """Returns the spec of an OPT config."""
    c.decides_tensors("enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings")
    layer = LayerSpec(window=None, rotary=None)
    width, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    if width % heads:
        reject("num_attention_heads", heads, f"a divisor of hidden_size ({width})")
    norm_before = c.flag("do_layer_norm_before")
    return ModelSpec(
        family=c.config.model_type,
        layers=(layer,) * c.integer("num_hidden_layers"),
        hidden_size=width,
        intermediate_size=c.integer("ffn_dim"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        vocab_size=c.integer("vocab_size"),
        context_length=c.integer("max_position_embeddings"),
        embedding_size=c.integer("word_embed_proj_dim"),
        norm="layer",
        norm_eps=1e-5,
        norm_before=norm_before,
        final_norm=norm_before and not c.flag("_remove_final_layer_norm"),
        activation=c.choice("activation_function", ACTIVATIONS),
        gated=False,
        query_scale=(width // heads) ** -0.5,
        position_offset=2,
    )


def opt_weights(reader: TensorReader) -> DecoderWeights:
    """Returns the weights of an OPT model."""
    s = reader.spec
    root = "model.decoder."
    embedding = reader.get(f"{root}embed_tokens.weight", s.vocab_size, s.embedding_size)
    rows = s.context_length + s.position_offset
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_layer(reader, f"{root}layers.{i}.") for i in range(len(s.layers))),
        final_norm=reader.norm(f"{root}final_layer_norm", s.hidden_size) if s.final_norm else None,
        head=reader.head(embedding),
        positions=reader.get(f"{root}embed_positions.weight", rows, s.hidden_size),
        project_in=reader.optional(f"{root}project_in.weight"),
        project_out=reader.optional(f"{root}project_out.weight"),
    )


def _layer(reader: TensorReader, prefix: str) -> Layer:
    s = reader.spec
    attention = f"{prefix}self_attn."
    return Layer(
        qkv=reader.qkv(attention),
        o=reader.linear(f"{attention}out_proj", s.hidden_size, s.hidden_size),
        ff=reader.ff(None, f"{prefix}fc1", f"{prefix}fc2"),
        attention_norm=reader.norm(f"{prefix}self_attn_layer_norm", s.hidden_size),
        ff_norm=reader.norm(f"{prefix}final_layer_norm", s.hidden_size),
    )
