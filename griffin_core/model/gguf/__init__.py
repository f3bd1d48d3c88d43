"""GGUF files: every key and tensor is either used, listed as ignored, or refused by name.

``understand`` reads and checks a file without its weights. ``write_model`` then writes it as a
transformers model directory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from griffin_core.errors import ModelError
from griffin_core.model.families.registry import spec_from_config
from griffin_core.model.gguf.config import config_of
from griffin_core.model.gguf.file import GgufFile, one_line, part_paths, read_gguf
from griffin_core.model.gguf.keys import (
    ARCHITECTURE_KEYS,
    CHAT_TEMPLATE_OF,
    TOKENIZER_KEYS,
    check_keys,
    ignored_because,
    names_no_token,
)
from griffin_core.model.gguf.tensors import Wanted, check_tensors, converted_state, wanted_tensors
from griffin_core.model.gguf.tokenizer import end_tokens, tokenizer_of

__all__ = ["CONVERTER_VERSION", "Understood", "part_paths", "understand", "write_model"]

CONVERTER_VERSION = 4
"""The version of the converter. Increase it whenever the same file gives another directory, so that
older copies are not used."""

SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""Keys with the authors' sampling defaults -> fields of generation_config.json."""


@dataclass(frozen=True, kw_only=True)
class Understood:
    """The checked contents of a file that can be converted.

    Args:
        config: the transformers config.
        wanted: the tensors of the model by their names in the file, which has all of them.
        end_tokens: the ids that end a completion.
    """

    file: GgufFile
    config: PreTrainedConfig
    wanted: Mapping[str, Wanted]
    tokenizer: PreTrainedTokenizerFast
    end_tokens: tuple[int, ...]

    @property
    def keys(self) -> dict[str, tuple[str, str]]:
        """The keys that are used -> their values, shortened, and what they set."""
        architecture = self.file.keys["general.architecture"]
        tables = {architecture: ARCHITECTURE_KEYS, "tokenizer": TOKENIZER_KEYS}
        used = {}
        for name, value in self.file.keys.items():
            family, _, rest = name.partition(".")
            rest = "chat_template" if rest.startswith(CHAT_TEMPLATE_OF) else rest
            if rest in tables.get(family, {}) and not names_no_token(self.file, name):
                used[name] = (one_line(repr(value), 80), tables[family][rest].meaning)
            elif name in SAMPLING:
                used[name] = (one_line(repr(value), 80), f"{SAMPLING[name]} of the sampling")
        return used

    @property
    def ignored(self) -> dict[str, str]:
        """The other keys -> why they are ignored."""
        beyond, unread = "beyond the vocabulary: no token", "llama.cpp reads no keys of that name"
        return {
            name: ignored_because(name) or (beyond if names_no_token(self.file, name) else unread)
            for name in self.file.keys
            if name not in self.keys
        }

    @property
    def quantization(self) -> dict[str, int]:
        """Tensor types -> the number of tensors of each type."""
        return dict(Counter(tensor.kind for tensor in self.file.tensors.values()))


def understand(path: Path) -> Understood:
    """Reads and checks a file, except for the values of its weights.

    Raises:
        UnknownFamily: the file has an unsupported architecture.
        BadModelFile: the file is not a GGUF file, is damaged, or has contents that are not
            supported.
    """
    file = read_gguf(path)
    check_keys(file)
    config = config_of(file)
    try:
        spec_from_config(config)
    except ModelError as error:
        raise type(error)(f"model: {path.name!r}: {error}") from error
    wanted = wanted_tensors(file, config)
    check_tensors(file, wanted)
    tokenizer = tokenizer_of(file, config.vocab_size)
    ends = end_tokens(file)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = ends
    config.pad_token_id = tokenizer.pad_token_id
    return Understood(
        file=file, config=config, wanted=wanted, tokenizer=tokenizer, end_tokens=tuple(ends)
    )


def write_model(model: Understood, dtype: torch.dtype, target: Path) -> None:
    """Writes config, weights and tokenizer into an empty directory.

    Args:
        dtype: the type of the weights.

    Raises:
        BadModelFile: a tensor cannot be dequantized.
        OSError, SafetensorError: ``target`` cannot be written, or is full.
    """
    model.config.dtype = dtype
    model.config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config.model_type]]
    model.config.save_pretrained(target)
    try:
        model.tokenizer.save_pretrained(target)
    except Exception as error:  # tokenizers raises a plain one, for example if the disk is full
        raise OSError(one_line(error)) from error
    generation = {
        "bos_token_id": model.tokenizer.bos_token_id,
        "eos_token_id": list(model.end_tokens),
        "pad_token_id": model.tokenizer.pad_token_id,
        **_sampling(model.file.keys),
    }
    said = {name: value for name, value in generation.items() if value is not None}
    (target / "generation_config.json").write_text(json.dumps(said, indent=2))
    state = converted_state(model.file, model.config, model.wanted, dtype)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


def _sampling(keys: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        field: keys[name]
        for name, field in SAMPLING.items()
        if type(keys.get(name)) in (int, float)
    }
    if "temperature" in found:
        found["do_sample"] = found["temperature"] > 0
    return found
