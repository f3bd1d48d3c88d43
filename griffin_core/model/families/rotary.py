"""Rotary positions: computes frequencies from a config's rope_parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from griffin_core.errors import BadModelFile
from griffin_core.model.families.config_fields import ConfigReader, is_number, refuse, reject
from griffin_core.spec.rope import RotarySpec

ROPE_TYPES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "default": frozenset(),
        "linear": frozenset({"factor"}),
        "dynamic": frozenset({"factor"}),
        "llama3": frozenset(
            {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        ),
        "yarn": frozenset(
            {
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
        "longrope": frozenset(
            {
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "short_factor",
                "long_factor",
            }
        ),
        "proportional": frozenset({"factor", "partial_rotary_factor"}),
    }
)
"""rope_type -> the entries that transformers' function of that name reads besides rope_theta. The
frequencies of "dynamic" and "longrope" depend on the length of the text, so cached keys would
become wrong. They are supported if they are constant up to max_position_embeddings, which no
sequence exceeds here."""

_ALWAYS = frozenset({"rope_theta", "rope_type", "type"})
_WITHOUT_EFFECT = frozenset({"attn_factor", "finetuned", "original_max_position_embeddings"})
"""Entries that describe how a model was made, or that transformers never reads: DeepSeek's
distillation of R1 into Qwen3 has an attn_factor besides yarn."""


def read_rotary(
    c: ConfigReader, *, head_dim: int, context_length: int, layer_type: str | None = None
) -> RotarySpec:
    """Returns the rotary positions of all layers, or of the layers of ``layer_type``.

    Args:
        head_dim: the size of a rotated query or key head; even.
        context_length: the most tokens of a sequence.
        layer_type: the type of layer, if rope_parameters has an entry for each type.

    Raises:
        UnknownFamily: the config needs something that is not supported; the message says what.
        BadModelFile: the values give no finite frequencies.
    """
    name = "rope_parameters" if layer_type is None else f"rope_parameters.{layer_type}"
    parameters = _parameters(c, name, layer_type)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        refuse("rope_type", kind, ", ".join(ROPE_TYPES))
    if parameters.get("type") not in (None, kind):
        refuse(f"{name}.type", parameters["type"], f"{kind!r}, the rope_type")
    for key, value in parameters.items():
        if key not in _ALWAYS | _WITHOUT_EFFECT | ROPE_TYPES[kind] and value not in (None, 1):
            read = ", ".join(sorted(_ALWAYS | ROPE_TYPES[kind]))
            refuse(f"{name}.{key}", value, f"null or 1, since {kind!r} reads only {read}")
    theta = parameters.get("rope_theta")
    if not is_number(theta) or theta <= 0:
        reject(f"{name}.rope_theta", theta, "a finite number > 0")
    if kind == "default":
        spec = RotarySpec(
            inverse_frequencies=tuple(theta ** (-2 * i / head_dim) for i in range(head_dim // 2))
        )
    else:
        spec = _scaled(c, name, kind, layer_type)
        if spec != _scaled(c, name, kind, layer_type, length=context_length):
            refuse(
                "rope_type",
                kind,
                "one whose frequencies are the same for every length up to "
                f"max_position_embeddings ({context_length})",
            )
    numbers = (*spec.inverse_frequencies, spec.scale)
    if len(numbers) != head_dim // 2 + 1 or not all(map(math.isfinite, numbers)):
        reject(name, parameters, f"values that give {head_dim // 2} finite frequencies")
    return spec


def _parameters(c: ConfigReader, name: str, layer_type: str | None) -> Mapping[str, Any]:
    parameters = c.value("rope_parameters")
    if layer_type is not None and isinstance(parameters, Mapping):
        for key, value in parameters.items():
            if not isinstance(value, Mapping):
                refuse(f"rope_parameters.{key}", value, "an entry for each of layer_types")
        parameters = parameters.get(layer_type)
    if not isinstance(parameters, Mapping):
        reject(name, parameters, "an object with rope_type and rope_theta")
    return parameters


def _scaled(
    c: ConfigReader, name: str, kind: str, layer_type: str | None, length: int | None = None
) -> RotarySpec:
    arguments = {} if layer_type is None else {"layer_type": layer_type}
    try:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](
            c.config, device=None, seq_len=length, **arguments
        )
        return RotarySpec(inverse_frequencies=tuple(frequencies.tolist()), scale=float(scale))
    except Exception as error:  # arithmetic on unchecked values
        raise BadModelFile(f"{name}: {kind!r} cannot be made of it: {error}") from error
