"""The families of models that the decoder defines."""

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
    """How a family of models is read.

    Args:
        spec: from the fields of its config.json.
        weights: from the tensors of its checkpoints.
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
"""model_type of transformers -> how it is read."""


def spec_from_config(config: PreTrainedConfig) -> ModelSpec:
    """Reads a transformers config.

    Raises:
        UnknownFamily: naming what the config asks for and what is known.
        BadModelFile: a value with which no decoder can be made.
    """
    spec, uses = examine_config(config)
    refused = [u for u in uses if u.use == "refused"]
    if refused:
        raise UnknownFamily(
            "; ".join(f"{u.name}: got {shown(u.value)}; allowed: {u.reason}" for u in refused)
        )
    return spec


def examine_config(config: PreTrainedConfig) -> tuple[ModelSpec, tuple[FieldUse, ...]]:
    """What a config says, and what becomes of each of its fields.

    Returns:
        The spec, which holds if no field is refused, and all fields.

    Raises:
        UnknownFamily, BadModelFile: a field that was read cannot be followed.
    """
    check_family(config.model_type)
    method = getattr(config, "quantization_config", None)
    if method:
        name = dict(method).get("quant_method", "?")
        raise UnknownFamily(
            f"quantization_config: got {name!r}; allowed: unquantized safetensors, or GGUF, which "
            "is dequantized on load"
        )
    if getattr(config, "is_heterogeneous", False):  # its fields cannot be read for all layers
        raise UnknownFamily("per_layer_config: got one; allowed: layers of one shape")
    reader = ConfigReader(config)
    spec = FAMILIES[config.model_type].spec(reader)
    return spec, tuple(field_uses(reader))


def check_family(family: object, *, text_part: object = None) -> None:
    """Refuses a model type that the decoder does not define.

    Args:
        text_part: the model type of its part that reads text, if it has parts.

    Raises:
        UnknownFamily: naming those that it does.
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
    """Sorts a state dict of one of the families into place.

    Queries, keys and values become one product, gate and up another; the FF's weights are kept by
    neuron. Nothing else of the state dict is copied, but what the backend lays out anew.

    Raises:
        BadModelFile: a tensor is missing, has the wrong shape, or has no use.
    """
    reader = TensorReader(spec, state, backend)
    weights = FAMILIES[spec.family].weights(reader)
    if unused := sorted(state.keys() - reader.used):
        raise BadModelFile(f"weights: tensors that the decoder does not use: {unused[:10]}")
    return weights
