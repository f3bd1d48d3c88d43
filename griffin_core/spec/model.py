"""What a decoder is made of, read from a transformers config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from transformers import PreTrainedConfig

from griffin_core.errors import UnknownFamily
from griffin_core.model.families.config_fields import (
    ConfigReader,
    FieldUse,
    field_uses,
    refuse,
    reject,
    shown,
)
from griffin_core.spec.rope import RotarySpec, read_rotary

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt")

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "relu": "relu",
    }
)
"""transformers' name -> the function."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What differs from layer to layer.

    Args:
        window: tokens a query sees, itself included; None for all before it.
        rotary: index into ``ModelSpec.rotaries``; None for learned positions.
    """

    window: int | None
    rotary: int | None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder's shape and its variants. Dimension letters are the project's (docs/structure.md).

    Args:
        layers: one LayerSpec for each of the L layers.
        rotaries: the kinds of rotary positions that layers use.
        width: D.
        ff_width: F.
        heads: H query heads; a multiple of kv_heads.
        embed_width: width of the embedding; differs from D in OPT-350m only.
        norm_before: normalize before attention and FF (True) or after the residual add (False).
        norm_offset: added to RMSNorm weights (1 in Gemma).
        sandwich_norms: further norms on the outputs of attention and FF (Gemma 2 and 3).
        final_norm: whether a norm precedes the head.
        query_scale: factor on q·k.
        attention_softcap: s -> cap * tanh(s / cap) on attention scores; None for none.
        logit_softcap: the same on logits.
        embed_scale: factor on embeddings.
        position_offset: rows skipped at the start of a learned position table (2 in OPT).
    """

    family: str
    layers: tuple[LayerSpec, ...]
    rotaries: tuple[RotarySpec, ...] = ()
    width: int
    ff_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_length: int
    embed_width: int
    norm: Norm
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


def spec_from_config(config: PreTrainedConfig) -> ModelSpec:
    """Reads a transformers config.

    Raises:
        UnknownFamily: naming what the config asks for and what is known.
        BadModelFile: a value with which no decoder can be made.
    """
    spec, uses = examine_config(config)
    refused = [u for u in uses if u.use == "refused"]
    if refused:
        raise UnknownFamily(
            "; ".join(f"{u.name}: got {shown(u.value)}; allowed: {u.reason}" for u in refused)
        )
    return spec


def examine_config(config: PreTrainedConfig) -> tuple[ModelSpec, tuple[FieldUse, ...]]:
    """What a config says, and what becomes of each of its fields.

    Returns:
        The spec, which holds if no field is refused, and all fields.

    Raises:
        UnknownFamily, BadModelFile: a field that was read cannot be followed.
    """
    check_family(config.model_type)
    method = getattr(config, "quantization_config", None)
    if method:
        name = dict(method).get("quant_method", "?")
        raise UnknownFamily(
            f"quantization_config: got {name!r}; allowed: unquantized safetensors, or GGUF, which "
            "is dequantized on load"
        )
    if getattr(config, "is_heterogeneous", False):  # its fields cannot be read for all layers
        raise UnknownFamily("per_layer_config: got one; allowed: layers of one shape")
    reader = ConfigReader(config)
    spec = _opt_spec(reader) if config.model_type == "opt" else _rotary_spec(reader)
    return spec, tuple(field_uses(reader))


def check_family(family: object, *, text_part: object = None) -> None:
    """Refuses a model type that the decoder does not define.

    Args:
        text_part: the model type of its part that reads text, if it has parts.

    Raises:
        UnknownFamily: naming those that it does.
    """
    if family not in FAMILIES:
        part = f". Its text part, {text_part}, is served, from a checkpoint of that part alone"
        raise UnknownFamily(
            f"model family: got {shown(family)}; known: {', '.join(FAMILIES)}"
            f"{part if text_part in FAMILIES else ''}"
        )


def _rotary_spec(c: ConfigReader) -> ModelSpec:
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
        width=width,
        ff_width=c.integer("intermediate_size"),
        heads=heads,
        kv_heads=_kv_heads(c, heads),
        head_dim=head_dim,
        vocabulary=c.integer("vocab_size"),
        context_length=context_length,
        embed_width=width,
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


def _opt_spec(c: ConfigReader) -> ModelSpec:
    c.decides_tensors("enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings")
    layer = LayerSpec(window=None, rotary=None)
    width, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    if width % heads:
        reject("num_attention_heads", heads, f"a divisor of hidden_size ({width})")
    norm_before = c.flag("do_layer_norm_before")
    return ModelSpec(
        family=c.config.model_type,
        layers=(layer,) * c.integer("num_hidden_layers"),
        width=width,
        ff_width=c.integer("ffn_dim"),
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        vocabulary=c.integer("vocab_size"),
        context_length=c.integer("max_position_embeddings"),
        embed_width=c.integer("word_embed_proj_dim"),
        norm="layer",
        norm_eps=1e-5,
        norm_before=norm_before,
        final_norm=norm_before and not c.flag("_remove_final_layer_norm"),
        activation=c.choice("activation_function", ACTIVATIONS),
        gated=False,
        query_scale=(width // heads) ** -0.5,
        position_offset=2,
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
    """The type of each layer. Where transformers has the same attention in all layers, it leaves
    out layer_types; what they say must then be that."""
    layers = c.integer("num_hidden_layers")
    given = c.value("layer_types")
    if c.config.model_type in ("llama", "gemma", "mistral"):
        window = c.value("sliding_window")  # transformers leaves one of llama and gemma out
        windowed = c.config.model_type == "mistral" and window is not None
        same = ("sliding_attention" if windowed else "full_attention",) * layers
        if given is not None and tuple(given) != same:
            refuse("layer_types", given, f"{same[0]!r} for all layers: {c.config.model_type}'s")
        return same
    if c.config.model_type.startswith("qwen"):  # transformers has made layer_types of both
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
    c.value("sliding_window")  # for layers that do not slide any is right
    return None
