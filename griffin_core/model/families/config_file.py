"""Reads the config.json of a model's directory, has transformers parse it, and checks it."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from griffin_core.errors import BadModelFile, ModelError
from griffin_core.model.families.config_fields import shown
from griffin_core.model.families.registry import FAMILIES, check_family, spec_from_config
from griffin_core.model.files import CONFIG_NAME, one_line, read_json_object
from griffin_core.spec.model import ModelSpec

QUANTIZATION_FIELDS = ("quantization_config", "compression_config", "quantization")
"""The fields of a config.json that say how weights were quantized."""


def read_config(directory: Path) -> tuple[PreTrainedConfig, ModelSpec]:
    """Reads and checks the config.json of a model's directory.

    Raises:
        UnknownFamily: the family, or a variant of it, is not supported; the message names the
            field.
        BadModelFile: the file cannot be read, or a value has the wrong type or is impossible.
    """
    said = read_json_object(directory / CONFIG_NAME)
    if "model_type" not in said:
        raise BadModelFile(f"{CONFIG_NAME}, model_type: missing; allowed: {', '.join(FAMILIES)}")
    try:
        check_family(said["model_type"], text_part=_text_part(said))
        check_unquantized(said)
        config = _parsed_config(directory, said)
        return config, spec_from_config(config)
    except ModelError as error:
        raise type(error)(f"{CONFIG_NAME}, {error}") from error


def _text_part(config: Mapping[str, Any]) -> object:
    """Returns the model type of the text part of a multimodal config; None if there is none."""
    part = config.get("text_config")
    if isinstance(part, dict) and "model_type" in part:
        return part["model_type"]
    with contextlib.suppress(Exception):  # an unknown family, or one without parts or defaults
        return CONFIG_MAPPING[config["model_type"]].sub_configs["text_config"].model_type
    return None


def check_unquantized(config: Mapping[str, Any]) -> None:
    """Refuses a config.json that says that weights are quantized.

    Raises:
        BadModelFile: the message names the field and the method.
    """
    for field in QUANTIZATION_FIELDS:
        if value := config.get(field):
            method = value.get("quant_method", value) if isinstance(value, dict) else value
            raise BadModelFile(
                f"{field}: got {str(method)[:80]!r}; allowed: unquantized safetensors, or GGUF, "
                "which is dequantized on load"
            )


def _parsed_config(directory: Path, said: Mapping[str, Any]) -> PreTrainedConfig:
    """Has transformers parse a config.json.

    Raises:
        BadModelFile: the message names the field at fault if it can be found.
    """
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except StrictDataclassFieldValidationError as error:
        if (field := re.search(r"field '(\w+)'", str(error))) is None:
            raise BadModelFile(one_line(error)) from error
        words = re.search(
            r"(?:expected|any type in|must be) (.+?)(?:, got|\. Errors|$)", one_line(error)
        )
        allowed = _in_words(words.group(1)) if words else one_line(error)
        value = shown(said.get(field.group(1)))
        raise BadModelFile(f"{field.group(1)}: got {value}; allowed: {allowed}") from error
    except Exception as error:  # each config class raises errors of its own
        blamed = "; ".join(f"{name}: got {shown(said[name])}" for name in _to_blame(said))
        raise BadModelFile(f"{blamed or 'its fields'}: {one_line(error)}") from error


def _to_blame(said: Mapping[str, Any]) -> list[str]:
    """Finds fields at fault: those without which, or with 1 in their place, the config can be
    parsed."""
    config_class = CONFIG_MAPPING[said["model_type"]]
    rest = {name: value for name, value in said.items() if name != "model_type"}

    def heals(name: str) -> bool:
        for other in ({k: v for k, v in rest.items() if k != name}, {**rest, name: 1}):
            with contextlib.suppress(Exception):  # any error means that another field is at fault
                config_class(**copy.deepcopy(other))
                return True
        return False

    blamed = [name for name in rest if heals(name)]
    return [] if len(blamed) == len(rest) else blamed  # if all are at fault, none can be blamed


def _in_words(types: str) -> str:
    """Translates Python type names in an error of transformers to the names of JSON types."""
    words = [word for name, word in _TYPES_IN_WORDS.items() if re.search(rf"\b{name}\b", types)]
    return " or ".join(words) or types


_TYPES_IN_WORDS = {
    "int": "an integer",
    "float": "a number with a decimal point",
    "bool": "true or false",
    "str": "a string",
    "list": "a list",
    "dict": "an object",
    "NoneType": "null",
}
