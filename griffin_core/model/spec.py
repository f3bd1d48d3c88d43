"""What a decoder is made of, read from a transformers config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from griffin_core.errors import UnknownFamily

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt")

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, kw_only=True)
class RotarySpec:
    """Rotary positions of one kind of layer (RoPE, arXiv 2104.09864).

    Args:
        inverse_frequencies: head_dim / 2 values, in radians a position.
        scale: factor on cos and sin (YaRN's attention factor; 1 otherwise).
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0


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
    """
    family = config.model_type
    if family not in FAMILIES:
        raise UnknownFamily(f"model family: got {family!r}; known: {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "?")
        raise UnknownFamily(
            f"quantized weights: got {method!r}; allowed: unquantized safetensors, or GGUF, which "
            "is dequantized on load"
        )
    return _opt_spec(config) if family == "opt" else _rotary_spec(config)


def _rotary_spec(c: Any) -> ModelSpec:
    gemma = c.model_type.startswith("gemma")
    newer_gemma = c.model_type in ("gemma2", "gemma3_text")
    if gemma and getattr(c, "use_bidirectional_attention", None):
        raise UnknownFamily("use_bidirectional_attention: got True; allowed: causal decoders only")
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    types = getattr(c, "layer_types", None) or [None] * c.num_hidden_layers
    rotaries = {kind: _rotary(c, kind, head_dim) for kind in dict.fromkeys(types)}
    distinct = tuple(dict.fromkeys(rotaries.values()))
    return ModelSpec(
        family=c.model_type,
        layers=tuple(
            LayerSpec(window=_window(c, kind), rotary=distinct.index(rotaries[kind]))
            for kind in types
        ),
        rotaries=distinct,
        width=c.hidden_size,
        ff_width=c.intermediate_size,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=c.vocab_size,
        context_length=c.max_position_embeddings,
        embed_width=c.hidden_size,
        norm="rms",
        norm_eps=c.rms_norm_eps,
        norm_offset=1.0 if gemma else 0.0,
        sandwich_norms=newer_gemma,
        query_key_norm=c.model_type in ("qwen3", "gemma3_text"),
        activation=_activation(c.hidden_activation if newer_gemma else c.hidden_act),
        gated=True,
        query_scale=(c.query_pre_attn_scalar if newer_gemma else head_dim) ** -0.5,
        attention_softcap=getattr(c, "attn_logit_softcapping", None),
        logit_softcap=getattr(c, "final_logit_softcapping", None),
        embed_scale=c.hidden_size**0.5 if gemma else 1.0,
    )


def _opt_spec(c: Any) -> ModelSpec:
    layer = LayerSpec(window=None, rotary=None)
    head_dim = c.hidden_size // c.num_attention_heads
    return ModelSpec(
        family=c.model_type,
        layers=(layer,) * c.num_hidden_layers,
        width=c.hidden_size,
        ff_width=c.ffn_dim,
        heads=c.num_attention_heads,
        kv_heads=c.num_attention_heads,
        head_dim=head_dim,
        vocabulary=c.vocab_size,
        context_length=c.max_position_embeddings,
        embed_width=c.word_embed_proj_dim,
        norm="layer",
        norm_eps=1e-5,
        norm_before=c.do_layer_norm_before,
        final_norm=c.do_layer_norm_before and not c._remove_final_layer_norm,
        activation=_activation(c.activation_function),
        gated=False,
        query_scale=head_dim**-0.5,
        position_offset=2,
    )


def _window(c: Any, layer_type: str | None) -> int | None:
    # A config without layer types (Mistral) means every layer.
    slides = layer_type == "sliding_attention" or (layer_type is None and c.model_type == "mistral")
    return c.sliding_window if slides else None


def _rotary(c: Any, layer_type: str | None, head_dim: int) -> RotarySpec:
    parameters = c.rope_parameters
    by_layer_type = layer_type in parameters
    if by_layer_type:
        parameters = parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        frequencies = tuple(
            parameters["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)
        )
        return RotarySpec(inverse_frequencies=frequencies)
    # These are fixed once; "dynamic" changes with the length of the text, and so does "longrope"
    # with two lists of factors, so keys already cached would be wrong.
    fixed = kind == "longrope" and parameters["short_factor"] == parameters["long_factor"]
    if kind not in ("linear", "llama3", "yarn") and not fixed:
        raise UnknownFamily(f"rope_type: got {kind!r}; allowed: default, linear, llama3, yarn")
    arguments = {"layer_type": layer_type} if by_layer_type else {}
    inverse_frequencies, scale = ROPE_INIT_FUNCTIONS[kind](c, device=None, **arguments)
    return RotarySpec(inverse_frequencies=tuple(inverse_frequencies.tolist()), scale=float(scale))


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise UnknownFamily(f"activation: got {name!r}; allowed: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
