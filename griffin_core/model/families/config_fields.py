"""The fields of a transformers config: which are read, and how the others are treated.

A field that changes the computation is either read by a family's ``spec`` through a
``ConfigReader``, or refused by name. The reader records the fields that are read, so there is no
second list to keep up to date. Fields that were not read are treated as follows:

- those in ``WITHOUT_EFFECT`` may have any value: they do not change logits;
- those in ``NEUTRAL`` may have the values given there: they belong to mechanisms that the families
  here do not have, and other values would enable one;
- other fields of the family's config class must have the default of the class, since transformers
  may read a field that is unknown here;
- names that the config class does not define are ignored, as in transformers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NoReturn, TypeGuard, TypeVar

from transformers import PreTrainedConfig

from griffin_core.errors import BadModelFile, UnknownFamily, shortened

T = TypeVar("T")
Use = Literal["read", "ignored", "refused"]

LONGEST_VALUE = 80
"""The most characters of a value that a message shows."""

_LABELS = "names and labels"
_TRAINING = "training only"
_TOKENS = "token ids; they end or fill texts and do not change logits"
_OUTPUTS = "what a call of the transformers model returns"
_STORAGE = "how the checkpoint was written; its tensors and their types are looked at themselves"
_ROPE = "transformers has moved it into rope_parameters, which is read"

WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "architectures": _STORAGE,
        "dtype": _STORAGE,
        "transformers_version": _STORAGE,
        "model_type": "the family",
        "id2label": _LABELS,
        "label2id": _LABELS,
        "problem_type": _LABELS,
        "return_dict": _OUTPUTS,
        "output_hidden_states": _OUTPUTS,
        "use_cache": _OUTPUTS,
        "attention_dropout": _TRAINING,
        "dropout": _TRAINING,
        "layerdrop": _TRAINING,
        "init_std": _TRAINING,
        "initializer_range": _TRAINING,
        "pad_token_id": _TOKENS,
        "bos_token_id": _TOKENS,
        "eos_token_id": _TOKENS,
        "chunk_size_feed_forward": "cuts the same product into pieces",
        "pretraining_tp": "cuts the same product into pieces",
        "original_max_position_embeddings": _ROPE,
        "rope_theta": _ROPE,
        "rope_scaling": _ROPE,
        "sliding_window_pattern": "transformers has made layer_types of it, which is read",
        "cache_implementation": "how transformers keeps keys and values",
    }
)
"""Field -> why no value of it changes the logits."""

_NONE: tuple[object, ...] = (None, False, 0)
_ONE: tuple[object, ...] = (None, 1)
_EMPTY: tuple[object, ...] = (None, {}, [], "")

NEUTRAL: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        # attention that is not causal, or not to all tokens before
        "add_cross_attention": _NONE,
        "attention_chunk_size": _NONE,
        "is_causal": (None, True),
        "is_encoder_decoder": _NONE,
        "layer_types": _EMPTY,
        "mlp_layer_types": _EMPTY,
        "per_layer_config": _EMPTY,
        "sliding_window": _NONE,
        "use_bidirectional_attention": _NONE,
        # positions
        "alibi": _NONE,
        "attn_temperature_tuning": _NONE,
        "no_rope_layer_interval": _NONE,
        "no_rope_layers": _EMPTY,
        "partial_rotary_factor": _ONE,
        "rope_interleaved": _NONE,
        "rotary_pct": _ONE,
        # factors, caps and norms of other families
        "attention_multiplier": _ONE,
        "attn_logit_softcapping": _NONE,
        "clip_qkv": _NONE,
        "embedding_multiplier": _ONE,
        "final_logit_softcapping": _NONE,
        "logit_scale": _ONE,
        "logits_scaling": _ONE,
        "mlp_bias": _NONE,
        "parallel_attn": _NONE,
        "qk_layernorm": _NONE,
        "qk_norm": _NONE,
        "query_pre_attn_scalar": _NONE,
        "residual_multiplier": _ONE,
        "scale_depth": _NONE,
        "scale_emb": _ONE,
        "use_parallel_residual": _NONE,
        "use_qk_norm": _NONE,
        # experts
        "n_routed_experts": _NONE,
        "num_experts": _NONE,
        "num_local_experts": _NONE,
        # parts of models that read more than text
        "audio_config": _EMPTY,
        "text_config": _EMPTY,
        "vision_config": _EMPTY,
        # weights that are not the tensors of the usual files
        "compression_config": _EMPTY,
        "distributed_config": _EMPTY,
        "fusion_config": _EMPTY,
        "pruned_heads": _EMPTY,
        "quantization": _EMPTY,
        "quantization_config": _EMPTY,
        "transformers_weights": _EMPTY,
    }
)
"""Field -> the values with which its mechanism is off. A family that has the mechanism reads the
field itself."""

UNKNOWN_NAME = "not a field of this family; transformers leaves it out, too"


def shown(value: object) -> str:
    """Formats a value for a message, cut to ``LONGEST_VALUE`` characters."""
    return shortened(repr(value), LONGEST_VALUE)


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Refuses a value that requires a variant that the decoder does not support.

    Raises:
        UnknownFamily: always.
    """
    raise UnknownFamily(f"{name}: got {shown(value)}; allowed: {allowed}")


def reject(name: str, value: object, allowed: str) -> NoReturn:
    """Refuses a value that is invalid for any decoder.

    Raises:
        BadModelFile: always.
    """
    raise BadModelFile(f"{name}: got {shown(value)}; allowed: {allowed}")


class ConfigReader:
    """Reads fields of a config one by one, checks each, and records which were read.

    Args:
        config: the config of a supported family.

    Attributes:
        config: the same.
        read: the names of the fields that were read so far.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config: Any = config
        self.read: set[str] = set()

    def value(self, name: str) -> Any:
        """Returns the field unchecked; None if the config does not have it."""
        self.read.add(name)
        return getattr(self.config, name, None)

    def integer(self, name: str, *, least: int = 1) -> int:
        """Returns an integer that is at least ``least``."""
        value = self.value(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            reject(name, value, f"an integer >= {least}")
        return value

    def number(self, name: str, *, zero: bool = False) -> float:
        """Returns a finite number above 0, or 0 if ``zero`` allows it."""
        value = self.value(name)
        if not is_number(value) or value < 0 or (value == 0 and not zero):
            reject(name, value, f"a finite number {'>=' if zero else '>'} 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Returns a finite number above 0, or None."""
        return None if self.value(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """Returns True or False; a missing flag is False."""
        value = self.value(name)
        if value not in (None, True, False):
            reject(name, value, "true or false")
        return bool(value)

    def choice(self, name: str, choices: Mapping[str, T]) -> T:
        """Returns the entry of ``choices`` for the field's value."""
        value = self.value(name)
        if not isinstance(value, str) or value not in choices:
            refuse(name, value, ", ".join(choices))
        return choices[value]

    def only(self, name: str, *allowed: object, why: str) -> None:
        """Refuses all values but ``allowed``."""
        value = self.value(name)
        if value not in allowed:
            refuse(name, value, why)

    def decides_tensors(self, *names: str) -> None:
        """Counts fields as read that only determine which tensors exist: tensors are checked
        against the checkpoint by name."""
        for name in names:
            self.flag(name)


def is_number(value: object) -> TypeGuard[float]:
    """Returns whether a value is a finite number and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class FieldUse:
    """How one field of a config is treated.

    Args:
        reason: why it is ignored; or, if it is refused, what is allowed.
    """

    name: str
    value: object
    use: Use
    reason: str


def field_uses(reader: ConfigReader) -> Iterator[FieldUse]:
    """Yields how every field is treated, ordered by name. Call it once all fields were read."""
    config = reader.config
    fields = {field.name: field for field in dataclasses.fields(config)}
    present = {name for name in vars(config) if not name.startswith("_")}
    for name in sorted(fields.keys() | present):
        value = getattr(config, name, None)
        use, reason = _use(name, value, fields.get(name), reader)
        yield FieldUse(name=name, value=value, use=use, reason=reason)


def _use(
    name: str, value: object, field: dataclasses.Field[Any] | None, reader: ConfigReader
) -> tuple[Use, str]:
    if name in reader.read:
        return "read", ""
    if name in WITHOUT_EFFECT:
        return "ignored", WITHOUT_EFFECT[name]
    if name in NEUTRAL:
        if value in NEUTRAL[name]:
            return "ignored", "asks for nothing"
        words = " or ".join(json.dumps(v) for v in NEUTRAL[name])
        return "refused", f"{words}, since {reader.config.model_type} has nothing like it here"
    if field is None:
        return "ignored", UNKNOWN_NAME
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if value == default:
        return "ignored", "the default"
    return "refused", f"{default!r}, the default: the effect of other values is not known here"
