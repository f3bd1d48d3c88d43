"""The fingerprint of a model: a hash of what its spec computes and of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from griffin_core.spec.model import LayerSpec, ModelSpec
from griffin_core.spec.rope import RotarySpec

FINGERPRINT_SAMPLES = 1024


def fingerprint(
    spec: ModelSpec, state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> str:
    """Returns 64 hexadecimal digits: a hash of the spec and of the name, shape, dtype and evenly
    spaced samples of every tensor. It is cheap for any size, and differs between any two trained
    models.

    Args:
        dtype: what the weights count as; None for what they are.
    """
    digest = hashlib.sha256(canonical(spec))
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tuple(tensor.shape)} {dtype or tensor.dtype}".encode())
        flat = tensor.flatten()
        samples = (
            flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)]
            .to(dtype or tensor.dtype)
            .contiguous()
            .cpu()
        )
        digest.update(samples.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def canonical(spec: ModelSpec) -> bytes:
    """Serializes every field that changes what a model computes. The names here are part of the
    wire format, so they stay the same if a field of a Python class is renamed. Floats are exact."""
    fields: dict[str, Any] = {
        "family": spec.family,
        "layers": [_layer(layer) for layer in spec.layers],
        "rotaries": [_rotary(rotary) for rotary in spec.rotaries],
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "embedding_size": spec.embedding_size,
        "norm": spec.norm,
        "norm_eps": spec.norm_eps,
        "norm_before": spec.norm_before,
        "norm_offset": spec.norm_offset,
        "sandwich_norms": spec.sandwich_norms,
        "query_key_norm": spec.query_key_norm,
        "final_norm": spec.final_norm,
        "activation": spec.activation,
        "gated": spec.gated,
        "query_scale": spec.query_scale,
        "attention_softcap": spec.attention_softcap,
        "logit_softcap": spec.logit_softcap,
        "embedding_scale": spec.embed_scale,
        "position_offset": spec.position_offset,
    }
    return json.dumps(_exact(fields), sort_keys=True, separators=(",", ":")).encode()


def _layer(layer: LayerSpec) -> dict[str, Any]:
    return {"window": layer.window, "rotary": layer.rotary}


def _rotary(rotary: RotarySpec) -> dict[str, Any]:
    return {"inverse_frequencies": list(rotary.inverse_frequencies), "scale": rotary.scale}


def _exact(value: Any) -> Any:
    """Returns the value with all floats in hexadecimal."""
    if isinstance(value, dict):
        return {name: _exact(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_exact(each) for each in value]
    return value.hex() if isinstance(value, float) else value
