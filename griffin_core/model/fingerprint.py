"""What tells models apart: what their spec computes, and their weights."""

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


def fingerprint(spec: ModelSpec, state: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits over the spec and, of every tensor, its name, shape, dtype and
    evenly spaced samples: cheap for any size, different for any two trained models."""
    digest = hashlib.sha256(canonical(spec))
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.flatten()
        samples = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].contiguous().cpu()
        digest.update(samples.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def canonical(spec: ModelSpec) -> bytes:
    """Every field that changes what a model computes, by names that are part of the wire: a field
    of a Python class may be renamed without a change here. Floats are written to the last bit."""
    fields: dict[str, Any] = {
        "family": spec.family,
        "layers": [_layer(layer) for layer in spec.layers],
        "rotaries": [_rotary(rotary) for rotary in spec.rotaries],
        "hidden_size": spec.width,
        "intermediate_size": spec.ff_width,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocabulary,
        "max_position_embeddings": spec.context_length,
        "embedding_size": spec.embed_width,
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
    """The same with floats in hexadecimal."""
    if isinstance(value, dict):
        return {name: _exact(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_exact(each) for each in value]
    return value.hex() if isinstance(value, float) else value
