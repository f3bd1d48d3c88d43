"""Makes a transformers state dict from the tensors of a GGUF file.

Every tensor of the model must be in the file, and every tensor of the file is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import AutoModelForCausalLM, PreTrainedConfig

from griffin_core.errors import listed
from griffin_core.model.gguf.config import ROPE_FACTORS
from griffin_core.model.gguf.file import QUANTIZATION_TYPES, GgufFile, GgufTensor

LEFT_OVER: dict[str, str] = {
    r"blk\.\d+\.attn_rot_embd\.weight": "frequencies that older files hold beside rope.freq_base",
}
"""Tensors that are not read -> why. llama.cpp skips them too."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A tensor that the model uses.

    Args:
        name: its name in the state dict.
        shape: its shape, in the state dict and in the file.
    """

    name: str
    shape: tuple[int, ...]


def wanted_tensors(file: GgufFile, config: PreTrainedConfig) -> Mapping[str, Wanted]:
    """Returns the tensors that the model uses, by their names in GGUF.

    Raises:
        BadModelFile: no model can be made of the config.
    """
    try:
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", trust_remote_code=False
            ).state_dict()
    except Exception as error:  # for example, sizes that no tensor can have
        raise file.bad(f"its keys make no model ({type(error).__name__}: {error})") from error
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(
        numbers[file.keys["general.architecture"]], config.num_hidden_layers
    )
    wanted = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        base, _, suffix = name.rpartition(".")
        # The name map of gguf has no lm_head for Gemma, since it is tied to the embedding there.
        known = "output" if base == "lm_head" else names.get_name(base)
        wanted[f"{known}.{suffix}"] = Wanted(name=name, shape=tuple(tensor.shape))
    return wanted


def check_tensors(file: GgufFile, wanted: Mapping[str, Wanted]) -> None:
    """Refuses a file whose tensors are not exactly those of the model.

    Raises:
        BadModelFile: names the tensors that are missing, have another shape or a type that cannot
            be read, or are in the file and not in the model.
    """
    missing = [f"{name} ({_by(w.shape)})" for name, w in wanted.items() if name not in file.tensors]
    used = {name: file.tensors[name] for name in wanted if name in file.tensors}
    shapes = [
        f"{tensor} that has to be {_by(wanted[name].shape)}"
        for name, tensor in used.items()
        if tensor.shape != wanted[name].shape
    ]
    kinds = [str(tensor) for tensor in used.values() if tensor.kind not in QUANTIZATION_TYPES]
    unused = [
        str(tensor)
        for name, tensor in file.tensors.items()
        if name not in wanted and not _may_be_left(file, name)
    ]
    wrong = {
        "it lacks": missing,
        "it has other shapes": shapes,
        "it has types that cannot be read": kinds,
        "it has what the model does not take": unused,
    }
    if any(wrong.values()):
        raise file.bad("; ".join(f"{what}: {listed(ts)}" for what, ts in wrong.items() if ts))


def converted_state(
    file: GgufFile, config: PreTrainedConfig, wanted: Mapping[str, Wanted], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Returns the dequantized state dict, with every tensor in the layout of transformers.

    Raises:
        BadModelFile: a tensor cannot be dequantized.
    """
    state = {}
    for name, want in wanted.items():
        try:
            values = file.tensors[name].values()
        except Exception as error:  # for example, truncated blocks
            raise file.bad(f"cannot dequantize {file.tensors[name]} ({error})") from error
        values = _as_in_transformers(file, config, file.tensors[name], values)
        state[want.name] = values.to(dtype).contiguous()
    return state


def _as_in_transformers(
    file: GgufFile, config: PreTrainedConfig, tensor: GgufTensor, values: torch.Tensor
) -> torch.Tensor:
    architecture: str = file.keys["general.architecture"]
    if architecture.startswith("gemma") and tensor.name.endswith("norm.weight"):
        return values - 1  # GGUF stores the whole factor, transformers the factor minus one
    if architecture == "llama" and ".attn_q." in tensor.name:
        return _unpermuted(values, config.num_attention_heads)
    if architecture == "llama" and ".attn_k." in tensor.name:
        return _unpermuted(values, config.num_key_value_heads)
    return values


def _unpermuted(values: torch.Tensor, heads: int) -> torch.Tensor:
    # llama.cpp rotates neighbouring elements, transformers the two halves of a head.
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _may_be_left(file: GgufFile, name: str) -> bool:
    if name == ROPE_FACTORS and file.keys["general.architecture"] == "llama":
        return True  # config_of reads it
    return any(re.fullmatch(pattern, name) for pattern in LEFT_OVER)


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
