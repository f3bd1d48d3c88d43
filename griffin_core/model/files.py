"""Finds or fetches the files of a model's directory, and reads JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from griffin_core.errors import BadModelFile, ModelNotFound, listed, shortened

CONFIG_NAME = "config.json"
JSON_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Optional files that hold a JSON object."""

REFUSED_FILES: Mapping[str, str] = MappingProxyType(
    {
        "adapter_config.json": "adapters are not applied; merge it into the weights",
        "adapter_model.safetensors": "adapters are not applied; merge it into the weights",
        "adapter_model.bin": "adapters are not applied; merge it into the weights",
        "hf_quant_config.json": "weights quantized by ModelOpt are not supported",
        "quantize_config.json": "weights quantized by GPTQ are not supported",
        "quant_config.json": "weights quantized by AWQ are not supported",
        "quantization_config.json": "quantized weights are not supported",
    }
)
"""File next to the weights -> why a model with this file is refused: it changes the weights."""

_HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def local_directory(model: str, where: str, *, allow_pickle: bool = False) -> Path:
    """Returns the directory of a model's files, which are fetched from the hub if necessary.

    Args:
        model: the name that the caller used, for messages.
        where: a directory or a hub id.
        allow_pickle: whether pickles are fetched if there are no safetensors.

    Raises:
        ModelNotFound: the hub id cannot be fetched, or is not a transformers model.
    """
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # only needed for the hub

    try:
        found = snapshot_download(where, allow_patterns=[*_HUB_FILES, "model*.safetensors"])
        if allow_pickle and not any(Path(found).glob("*.safetensors")):
            found = snapshot_download(where, allow_patterns=[*_HUB_FILES, "pytorch_model*.bin"])
    except Exception as error:  # errors of the hub, of the network, and of the disk
        raise ModelNotFound(
            f"model: got {model!r}, which is not a directory or .gguf file and cannot be fetched "
            f"from the hub ({one_line(error)})"
        ) from error
    if not (Path(found) / CONFIG_NAME).is_file():
        raise ModelNotFound(no_config(model, Path(found)))
    return Path(found)


def no_config(model: str, directory: Path) -> str:
    """Returns a message that a directory has no config.json, and what it holds instead."""
    said = f"model: {model!r} has no config.json; a Hugging Face model has one"
    if found := sorted(path.name for path in directory.glob("*.gguf")):
        return f"{said}. To load a .gguf file, name the file: {listed(found)}"
    for name, why in REFUSED_FILES.items():
        if (directory / name).exists():
            return f"{said}. It has {name}: {why}"
    return said


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        BadModelFile: it cannot be read; the message names the file and the reason.
    """
    try:
        value = json.loads(path.read_text("utf-8"))  # transformers accepts no other encoding either
    except (OSError, ValueError, RecursionError) as error:
        raise BadModelFile(f"{path.name}: cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise BadModelFile(f"{path.name}: got {type(value).__name__}; allowed: a JSON object")
    return value


def check_files(directory: Path) -> None:
    """Refuses a model that has adapters or quantized weights, or a JSON file that cannot be read.

    Raises:
        BadModelFile: the message names the file.
    """
    for name, why in REFUSED_FILES.items():
        if (directory / name).exists():
            raise BadModelFile(f"{name} is next to the weights; {why}")
    for name in JSON_FILES:
        if (directory / name).exists():
            read_json_object(directory / name)


def one_line(error: BaseException, most: int = 400) -> str:
    """Returns an error's message in one line of at most ``most`` characters."""
    while type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # its message is only the key
        said = f"no entry {said}"
    return shortened(said, most)
