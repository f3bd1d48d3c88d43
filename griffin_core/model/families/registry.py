"""The model families that the decoder supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor
from transformers import PreTrainedConfig

from griffin_core.backends.base import Backend
from griffin_core.errors import BadModelFile, UnknownFamily
from griffin_core.model.families.config_fields import (
    ConfigReader,
    FieldUse,
    field_uses,
    shown,
)
from griffin_core.model.families.llama import llama_spec, llama_weights
from griffin_core.model.families.opt import opt_spec, opt_weights
from griffin_core.model.families.tensors import TensorReader
from griffin_core.model.weights import DecoderWeights
from griffin_core.spec.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a model family is read.

    Args:
        spec: makes a ModelSpec from the fields of its config.json.
        weights: makes decoder weights from the tensors of its checkpoints.
    """

    spec: Callable[[ConfigReader], ModelSpec]
    weights: Callable[[TensorReader], DecoderWeights]


_LLAMA = Family(spec=llama_spec, weights=llama_weights)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "gemma": _LLAMA,
        "gemma2": _LLAMA,
        "gemma3_text": _LLAMA,
        "opt": Family(spec=opt_spec, weights=opt_weights),
    }
)
"""The model_type of transformers -> how the family is read."""


def spec_from_config(config: PreTrainedConfig) -> ModelSpec:
    """Reads a transformers config.

    Raises:
        UnknownFamily: the config needs something that is not supported; the message says what.
        BadModelFile: a value is invalid.
    """
    spec, uses = examine_config(config)
    refused = [u for u in uses if u.use == "refused"]
    if refused:
        raise UnknownFamily(
            "; ".join(f"{u.name}: got {shown(u.value)}; allowed: {u.reason}" for u in refused)
        )
    return spec


def examine_config(config: PreTrainedConfig) -> tuple[ModelSpec, tuple[FieldUse, ...]]:
    """Reads a config, and reports how each of its fields is treated.

    Returns:
        The spec, which is valid if no field is refused, and the treatment of all fields.

    Raises:
        UnknownFamily, BadModelFile: the value of a field that was read is not supported or invalid.
    """
    check_family(config.model_type)
    method = getattr(config, "quantization_config", None)
    if method:
        name = dict(method).get("quant_method", "?")
        raise UnknownFamily(
            f"quantization_config: got {name!r}; allowed: unquantized safetensors, or GGUF, which "
            "is dequantized on load"
        )
    if getattr(config, "is_heterogeneous", False):  # its fields differ between layers
        raise UnknownFamily("per_layer_config: got one; allowed: layers of one shape")
    reader = ConfigReader(config)
    spec = FAMILIES[config.model_type].spec(reader)
    return spec, tuple(field_uses(reader))


def check_family(family: object, *, text_part: object = None) -> None:
    """Refuses a model type that the decoder does not support.

    Args:
        text_part: the model type of the text part of a multimodal model.

    Raises:
        UnknownFamily: the message names the supported families.
    """
    if not isinstance(family, str) or family not in FAMILIES:
        part = f". Its text part, {text_part}, is served, from a checkpoint of that part alone"
        raise UnknownFamily(
            f"model family: got {shown(family)}; known: {', '.join(FAMILIES)}"
            f"{part if isinstance(text_part, str) and text_part in FAMILIES else ''}"
        )


def weights_from_state(
    spec: ModelSpec, state: Mapping[str, Tensor], backend: Backend
) -> DecoderWeights:
    """Makes decoder weights from a state dict of one of the families.

    Queries, keys and values become one product, gate and up another; FF weights are stored by
    neuron. Other tensors are copied only if the backend changes their layout.

    Raises:
        BadModelFile: a tensor is missing, has the wrong shape, or is not used.
    """
    reader = TensorReader(spec, state, backend)
    weights = FAMILIES[spec.family].weights(reader)
    if unused := sorted(state.keys() - reader.used):
        raise BadModelFile(f"weights: tensors that the decoder does not use: {unused[:10]}")
    return weights
