"""The files of a model's directory: found or fetched, and read as JSON."""

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
"""Further files that hold a JSON object, if they are there."""

REFUSED_FILES: Mapping[str, str] = MappingProxyType(
    {
        "adapter_config.json": "adapters are not applied; merge it into the weights",
        "adapter_model.safetensors": "adapters are not applied; merge it into the weights",
        "adapter_model.bin": "adapters are not applied; merge it into the weights",
        "hf_quant_config.json": "weights quantized by ModelOpt are not known",
        "quantize_config.json": "weights quantized by GPTQ are not known",
        "quant_config.json": "weights quantized by AWQ are not known",
        "quantization_config.json": "quantized weights are not known",
    }
)
"""File beside the weights -> why a model with it is refused: the weights are not all of it."""

_HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def local_directory(model: str, where: str) -> Path:
    """The directory of a model's files; a hub's are fetched if they are not here.

    Args:
        model: as the caller named it, for messages.
        where: a directory or a hub id.

    Raises:
        ModelNotFound: the hub id is not to be had, or is no model of transformers.
    """
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # only where a hub is asked

    try:
        found = snapshot_download(where, allow_patterns=[*_HUB_FILES, "model*.safetensors"])
        if not any(Path(found).glob("*.safetensors")):
            found = snapshot_download(where, allow_patterns=[*_HUB_FILES, "pytorch_model*.bin"])
    except Exception as error:  # of the hub, of what carries it, and of the disk
        raise ModelNotFound(
            f"model: got {model!r}, which is no directory, no .gguf file, and not to be had from "
            f"the hub ({one_line(error)})"
        ) from error
    if not (Path(found) / CONFIG_NAME).is_file():
        raise ModelNotFound(no_config(model, Path(found)))
    return Path(found)


def no_config(model: str, directory: Path) -> str:
    """Says that a directory has no config.json, and what it has instead."""
    said = f"model: {model!r} has no config.json; a Hugging Face model has one"
    if found := sorted(path.name for path in directory.glob("*.gguf")):
        return f"{said}. Name a .gguf file itself: {listed(found)}"
    for name, why in REFUSED_FILES.items():
        if (directory / name).exists():
            return f"{said}. It has {name}: {why}"
    return said


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        BadModelFile: naming the file and what is wrong.
    """
    try:
        value = json.loads(path.read_text("utf-8"))  # transformers, too, takes no other encoding
    except (OSError, ValueError, RecursionError) as error:
        raise BadModelFile(f"{path.name}: cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise BadModelFile(f"{path.name}: got {type(value).__name__}; allowed: a JSON object")
    return value


def check_files(directory: Path) -> None:
    """Refuses a model whose weights are not all that it is made of, or one of whose smaller files
    cannot be read.

    Raises:
        BadModelFile: naming the file.
    """
    for name, why in REFUSED_FILES.items():
        if (directory / name).exists():
            raise BadModelFile(f"{name} is beside the weights; {why}")
    for name in JSON_FILES:
        if (directory / name).exists():
            read_json_object(directory / name)


def one_line(error: BaseException, most: int = 400) -> str:
    """What an error says, in one line of at most ``most`` characters."""
    while type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # which says the key and nothing else
        said = f"no entry {said}"
    return shortened(said, most)
