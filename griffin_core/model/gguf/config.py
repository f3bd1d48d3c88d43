"""Makes a transformers config from the keys of a GGUF file.

Missing keys have the same defaults as in llama.cpp. The GGUF reader of transformers is not used,
since it drops rope scaling, soft caps and the query scale of the largest Gemma models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from griffin_core.model.gguf.file import GgufFile, one_line
from griffin_core.model.gguf.keys import architecture_keys

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor whose values divide the plain rotary frequencies (Llama 3.1)."""

_ROPE_THETA = 10000.0
_GEMMA_2_LAYERS_27B = 46
_GEMMA_3_LAYERS_27B = 62
_GEMMA_2_WINDOW = 4096
_GEMMA_2_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_PATTERNS = {"gemma2": 2, "gemma3": 6}
_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
_SCALING = "rope.scaling."


def config_of(file: GgufFile) -> PreTrainedConfig:
    """Returns the config of a file whose keys are checked.

    Raises:
        BadModelFile: keys are missing or contradict one another.
    """
    architecture: str = file.keys["general.architecture"]
    keys = architecture_keys(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.bad("it lacks the tensor token_embd.weight")
    layers, heads, width = (
        _needed(file, keys, name)
        for name in ("block_count", "attention.head_count", "embedding_length")
    )
    _check_layers(file, layers)
    if "attention.key_length" not in keys and width % heads:
        raise file.bad(f"embedding_length {width} is no multiple of attention.head_count {heads}")
    head_dim = keys.get("attention.key_length", width // heads)
    for name in (
        "attention.value_length",
        "rope.dimension_count",
        "attention.key_length_swa",
        "attention.value_length_swa",
        "rope.dimension_count_swa",
    ):
        _same(file, name, keys.get(name, head_dim), "the width of a head", head_dim)
    vocab_size = embedding.shape[0]
    _same(file, "vocab_size", keys.get("vocab_size", vocab_size), str(embedding), vocab_size)
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": _needed(file, keys, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _needed(file, keys, "context_length"),
        "rms_norm_eps": _needed(file, keys, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(file, keys, architecture, head_dim),
    }
    if architecture != "qwen2":  # the family always has biases, except on attn_output
        fields["attention_bias"] = any(name.endswith(_BIASES) for name in file.tensors)
    family, more = _of_family(file, architecture, keys, fields)
    try:
        return CONFIG_MAPPING[family](**{**fields, **more})
    except Exception as error:  # transformers has its own errors for contradicting fields
        raise file.bad(f"its keys make no config ({type(error).__name__}: {error})") from error


def _of_family(
    file: GgufFile, architecture: str, keys: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    window = keys.get("attention.sliding_window", 0)
    layers, width, heads = (
        fields[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    match architecture:
        case "llama" if window:
            return "mistral", {"sliding_window": window}
        case "gemma2":
            # llama.cpp also chooses the query scale of the largest model by its number of layers.
            scalar = width // heads if layers == _GEMMA_2_LAYERS_27B else fields["head_dim"]
            return "gemma2", {
                **{
                    name: keys.get(name, default) or None
                    for name, default in _GEMMA_2_SOFTCAPS.items()
                },
                "query_pre_attn_scalar": scalar,
                "sliding_window": keys.get("attention.sliding_window", _GEMMA_2_WINDOW),
                "layer_types": _layer_types(file, architecture, keys, layers),
            }
        case "gemma3":
            scalar = width // heads if layers == _GEMMA_3_LAYERS_27B else fields["head_dim"]
            types = _layer_types(file, architecture, keys, layers) if window else None
            return "gemma3_text", {
                "final_logit_softcapping": keys.get("final_logit_softcapping") or None,
                "query_pre_attn_scalar": scalar,
                "sliding_window": window or fields["max_position_embeddings"],
                "layer_types": types or ["full_attention"] * layers,
            }
    if window:
        raise file.bad(f"attention.sliding_window: got {window}; allowed for {architecture}: 0")
    return architecture, {}


def _layer_types(
    file: GgufFile, architecture: str, keys: Mapping[str, Any], layers: int
) -> list[str]:
    name = "attention.sliding_window_pattern"
    pattern = keys.get(name, _PATTERNS[architecture])
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 0:
        slides = [pattern == 0 or (i + 1) % pattern != 0 for i in range(layers)]
    elif isinstance(pattern, list) and len(pattern) == layers and set(pattern) <= {True, False}:
        slides = pattern
    else:
        raise file.bad(
            f"{name}: got {one_line(repr(pattern), 80)}; allowed: an integer of at least 0, or a "
            f"flag for each of {layers} layers"
        )
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _rope(
    file: GgufFile, keys: Mapping[str, Any], architecture: str, head_dim: int
) -> dict[str, Any]:
    theta = keys.get("rope.freq_base", _ROPE_THETA)
    if architecture == "gemma3":
        theta = _needed(file, keys, "rope.freq_base")
    if not theta > 0 or not keys.get("rope.freq_base_swa", _ROPE_THETA) > 0:
        raise file.bad("rope.freq_base: got 0; allowed: more than 0")
    parameters = {"rope_theta": theta, **_scaling(file, keys, architecture, head_dim)}
    if architecture != "gemma3":
        return parameters
    local = keys.get("rope.freq_base_swa", _ROPE_THETA)
    return {
        "full_attention": parameters,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _scaling(
    file: GgufFile, keys: Mapping[str, Any], architecture: str, head_dim: int
) -> dict[str, Any]:
    factor = keys.get(f"{_SCALING}factor", keys.get("rope.scale_linear", 0)) or 1.0
    kind = keys.get(f"{_SCALING}type", "linear")
    of_yarn = [
        name
        for name in keys
        if name.startswith((f"{_SCALING}yarn_", f"{_SCALING}attn_factor"))
        and not (name.endswith("attn_factor") and keys[name] == 1)
    ]
    if kind != "yarn" and of_yarn:
        raise file.bad(f"{of_yarn[0]}: got {keys[of_yarn[0]]} with rope.scaling.type {kind!r}")
    factors = file.tensors.get(ROPE_FACTORS) if architecture == "llama" else None
    if factors is not None:
        if kind == "yarn":
            raise file.bad(f"rope.scaling.type: got 'yarn' together with {factors}")
        scale = factor if kind == "linear" else 1.0
        return _divided(file, [scale * value for value in _factors(file, head_dim)])
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if architecture == "gemma3":
        raise file.bad("rope.scaling.type: got 'yarn'; allowed for gemma3: none, linear")
    return _yarn(file, keys, factor)


def _yarn(file: GgufFile, keys: Mapping[str, Any], factor: float) -> dict[str, Any]:
    def attention(share: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0

    given = keys.get(f"{_SCALING}yarn_attn_factor")
    if given is not None and given < 1:
        raise file.bad(
            f"rope.scaling.yarn_attn_factor: got {given}; allowed: at least 1, a config's "
            "attention_factor. Less is a config's attn_factor, which converters write there, too, "
            "and neither transformers nor llama.cpp reads; take the key out"
        )
    if given is None:
        more, all_dimensions = (
            keys.get(f"{_SCALING}{name}", default)
            for name, default in (("attn_factor", 1.0), ("yarn_log_multiplier", 0.0))
        )
        given = more * attention(1.0) / attention(all_dimensions)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "attention_factor": float(given),
        "beta_fast": keys.get(f"{_SCALING}yarn_beta_fast", 32.0),
        "beta_slow": keys.get(f"{_SCALING}yarn_beta_slow", 1.0),
        "original_max_position_embeddings": keys.get(
            f"{_SCALING}original_context_length", keys.get("context_length")
        ),
    }


def _factors(file: GgufFile, head_dim: int) -> list[float]:
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.shape != (head_dim // 2,):
        raise file.bad(f"{tensor}: the shape that the keys give is {head_dim // 2}")
    values: list[float] = tensor.values().tolist()
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise file.bad(f"{tensor}: its values divide frequencies; allowed: more than 0")
    return values


def _divided(file: GgufFile, factors: list[float]) -> dict[str, Any]:
    # With this rope_type transformers divides each plain frequency by its own factor. Both lists
    # are the same, so the frequencies do not depend on the length of the text.
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": _needed(
            file, architecture_keys(file), "context_length"
        ),
    }


def _needed(file: GgufFile, keys: Mapping[str, Any], name: str) -> Any:
    if name not in keys:
        raise file.bad(f"it lacks the key {file.keys['general.architecture']}.{name}")
    return keys[name]


def _same(file: GgufFile, name: str, given: int, what: str, expected: int) -> None:
    if given != expected:
        raise file.bad(f"{name}: got {given}; allowed: {expected}, by {what}")


def _check_layers(file: GgufFile, layers: int) -> None:
    found = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    missing = [f"blk.{i}" for i in range(min(layers, len(found) + 10)) if str(i) not in found]
    if len(found) != layers or missing:
        raise file.bad(
            f"block_count: got {layers}; its tensors are of {len(found)} layers"
            + (f", without {', '.join(missing)}" if missing else "")
        )
