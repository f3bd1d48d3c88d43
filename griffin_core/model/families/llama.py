"""Llama and similar families: rotary positions, RMSNorms, and a gated FF."""

from __future__ import annotations

from griffin_core.model.families.activations import ACTIVATIONS
from griffin_core.model.families.config_fields import (
    ConfigReader,
    refuse,
    reject,
)
from griffin_core.model.families.rotary import read_rotary
from griffin_core.model.families.tensors import TensorReader
from griffin_core.model.weights import DecoderWeights, Layer
from griffin_core.spec.model import LayerSpec, ModelSpec


def llama_spec(c: ConfigReader) -> ModelSpec:
    """Returns the spec of a config of one of these families."""
    family = c.config.model_type
    gemma = family.startswith("gemma")
    newer_gemma = family in ("gemma2", "gemma3_text")
    c.only("mlp_bias", None, False, why="false: a gated FF with biases is not known")
    c.decides_tensors("attention_bias", "tie_word_embeddings")
    width, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    head_dim = _head_dim(c, width, heads)
    context_length = c.integer("max_position_embeddings")
    types = _layer_types(c)
    by_type = family == "gemma3_text"
    rotaries = {
        kind: read_rotary(
            c,
            head_dim=head_dim,
            context_length=context_length,
            layer_type=kind if by_type else None,
        )
        for kind in dict.fromkeys(types)
    }
    distinct = tuple(dict.fromkeys(rotaries.values()))
    windows = {kind: _window(c, kind) for kind in rotaries}
    return ModelSpec(
        family=family,
        layers=tuple(
            LayerSpec(window=windows[kind], rotary=distinct.index(rotaries[kind])) for kind in types
        ),
        rotaries=distinct,
        hidden_size=width,
        intermediate_size=c.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=_kv_heads(c, heads),
        head_dim=head_dim,
        vocab_size=c.integer("vocab_size"),
        context_length=context_length,
        embedding_size=width,
        norm="rms",
        norm_eps=c.number("rms_norm_eps", zero=True),
        norm_offset=1.0 if gemma else 0.0,
        sandwich_norms=newer_gemma,
        query_key_norm=family in ("qwen3", "gemma3_text"),
        activation=c.choice("hidden_activation" if newer_gemma else "hidden_act", ACTIVATIONS),
        gated=True,
        query_scale=(c.number("query_pre_attn_scalar") if newer_gemma else head_dim) ** -0.5,
        attention_softcap=c.optional_number("attn_logit_softcapping")
        if family == "gemma2"
        else None,
        logit_softcap=c.optional_number("final_logit_softcapping") if newer_gemma else None,
        embed_scale=width**0.5 if gemma else 1.0,
    )


def _head_dim(c: ConfigReader, width: int, heads: int) -> int:
    given = c.value("head_dim")
    head_dim = width // heads if given is None else c.integer("head_dim")
    if head_dim % 2 or not head_dim:
        name, value = ("num_attention_heads", heads) if given is None else ("head_dim", given)
        reject(name, value, "what gives heads of an even width, whose halves are rotated")
    return head_dim


def _kv_heads(c: ConfigReader, heads: int) -> int:
    kv_heads = c.integer("num_key_value_heads")
    if heads % kv_heads:
        reject("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    return kv_heads


def _layer_types(c: ConfigReader) -> tuple[str, ...]:
    """Returns the type of each layer. For families with the same attention in all layers,
    transformers omits layer_types; if it is given, all entries must be that type."""
    layers = c.integer("num_hidden_layers")
    given = c.value("layer_types")
    if c.config.model_type in ("llama", "gemma", "mistral"):
        window = c.value("sliding_window")  # transformers omits it for llama and gemma
        windowed = c.config.model_type == "mistral" and window is not None
        same = ("sliding_attention" if windowed else "full_attention",) * layers
        if given is not None and tuple(given) != same:
            refuse("layer_types", given, f"{same[0]!r} for all layers: {c.config.model_type}'s")
        return same
    if c.config.model_type.startswith("qwen"):  # transformers has derived layer_types from both
        c.value("max_window_layers")
        c.flag("use_sliding_window")
    if not isinstance(given, (list, tuple)) or len(given) != layers:
        reject("layer_types", given, f"one for each of {layers} layers")
    for kind in given:
        if kind not in ("full_attention", "sliding_attention"):
            refuse("layer_types", kind, "full_attention, sliding_attention")
    return tuple(given)


def _window(c: ConfigReader, layer_type: str) -> int | None:
    if layer_type == "sliding_attention":
        return c.integer("sliding_window")
    c.value("sliding_window")  # unused if no layer slides
    return None


def llama_weights(reader: TensorReader) -> DecoderWeights:
    """Returns the weights of a family with rotary positions and RMSNorms."""
    s = reader.spec
    embedding = reader.get("model.embed_tokens.weight", s.vocab_size, s.hidden_size)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_layer(reader, f"model.layers.{i}.") for i in range(len(s.layers))),
        final_norm=reader.norm("model.norm", s.hidden_size),
        head=reader.head(embedding),
    )


def _layer(reader: TensorReader, prefix: str) -> Layer:
    s = reader.spec
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    post_attention = f"{prefix}post_attention_layernorm"
    return Layer(
        qkv=reader.qkv(attention),
        o=reader.linear(f"{attention}o_proj", s.hidden_size, s.num_heads * s.head_dim),
        ff=reader.ff(f"{mlp}gate_proj", f"{mlp}up_proj", f"{mlp}down_proj"),
        attention_norm=reader.norm(f"{prefix}input_layernorm", s.hidden_size),
        ff_norm=reader.norm(
            f"{prefix}pre_feedforward_layernorm" if s.sandwich_norms else post_attention,
            s.hidden_size,
        ),
        q_norm=reader.norm(f"{attention}q_norm", s.head_dim) if s.query_key_norm else None,
        k_norm=reader.norm(f"{attention}k_norm", s.head_dim) if s.query_key_norm else None,
        attention_out_norm=reader.norm(post_attention, s.hidden_size) if s.sandwich_norms else None,
        ff_out_norm=reader.norm(f"{prefix}post_feedforward_layernorm", s.hidden_size)
        if s.sandwich_norms
        else None,
    )
