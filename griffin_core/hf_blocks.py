"""Finds the feedforward (FF) blocks of a transformers model by their structure.

A block is a module that holds two or three linear layers and the activation between them: gate, up
and down; gate and up in one layer, and down; or up and down. Nothing between them may mix neurons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from griffin_core.errors import InvalidRequest, UnknownFamily

_ACTIVATION = re.compile("activation|elu|silu|swish|mish|sigmoid|tanh", re.IGNORECASE)
"""Matches the class names of activations, in torch and in transformers."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """An FF block.

    Args:
        name: its path in the model.
        inner: gate and up, or one layer with both, or up alone.
        down: the linear layer that reads the activations Z [T, F].
    """

    name: str
    inner: tuple[nn.Module, ...]
    down: nn.Module


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """Returns the FF block of each layer; all have the same width.

    Raises:
        UnknownFamily: the model has an encoder, or a layer with another structure.
        InvalidRequest: it is not a transformers model, or is in training mode.
    """
    family = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InvalidRequest("model", family, "a causal language model of transformers")
    if model.training:
        raise InvalidRequest("model", f"{family} in training mode", "after model.eval()")
    if model.config.is_encoder_decoder:
        raise UnknownFamily(f"{family} has an encoder; allowed: models of a decoder alone")
    config = model.config.get_text_config(decoder=True)
    count, width = (getattr(config, of, None) for of in ("num_hidden_layers", "hidden_size"))
    names = {module: name for name, module in model.named_modules()}
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and width:
            blocks = [_find_block(layer, names, width) for layer in module]
            break
    else:
        raise UnknownFamily(f"{family} has no list of {count} layers; allowed: one of all layers")
    for block in blocks:
        if sizes(block.down) != sizes(blocks[0].down):
            raise UnknownFamily(f"{block.name} is not as wide as {blocks[0].name}")
    return blocks


def _find_block(layer: nn.Module, names: Mapping[nn.Module, str], width: int) -> Block:
    """Returns the only FF block of a layer.

    Args:
        names: the path of each module.
        width: D, the hidden size.
    """
    found = [module for module in layer.modules() if _may_be_block(module, width)]
    if len(found) != 1:
        listed = ", ".join(_described(module, names) for module in found[:4])
        raise UnknownFamily(
            f"{_described(layer, names)} has {len(found)} feedforward blocks"
            f"{': ' if listed else ''}{listed}; allowed: one a layer"
        )
    block = found[0]
    linears = _linears(block)
    downs = _downs(linears, width)
    # A norm between activation and down projection would mix neurons.
    others = [] if block is layer else [m for m in block.children() if m not in linears]
    strange = [m for m in others if not _plain(m)]
    if len(downs) != 1 or strange:
        holds = ", ".join(
            f"{name} {type(module).__name__}{sizes(module) or ''}"
            for name, module in block.named_children()
        )
        raise UnknownFamily(
            f"{_described(block, names)} holds {holds}; allowed: two or three linear layers "
            f"around an activation, from {width} to another width and back"
        )
    inner = tuple(linear for linear in linears if linear is not downs[0])
    return Block(name=names[block], inner=inner, down=downs[0])


def _may_be_block(module: nn.Module, width: int) -> bool:
    """Returns whether a module holds an activation, or three linear layers with the shapes of a
    gated FF, whose activation may be a function."""
    linears = _linears(module)
    gated = len(linears) == 3 and len(_downs(linears, width)) > 0
    return gated or any(_is_activation(child) for child in module.children())


def _downs(linears: Sequence[nn.Module], width: int) -> list[nn.Module]:
    """Returns the linear layers of a block whose shapes fit a down projection."""
    downs = []
    for down in linears:
        intermediate_size, out = sizes(down) or (0, 0)
        inner = [sizes(linear) for linear in linears if linear is not down]
        plain, fused = [(width, intermediate_size)], [(width, 2 * intermediate_size)]
        if out == width and inner in (plain, 2 * plain, fused):
            downs.append(down)
    return downs


def _linears(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if sizes(child)]


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """Returns the input and output sizes of a linear layer, quantized or not; None for another
    module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    reads, gives = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (reads, gives) if isinstance(reads, int) and isinstance(gives, int) else None


def _is_activation(module: nn.Module) -> bool:
    return _ACTIVATION.search(type(module).__name__) is not None


def _plain(module: nn.Module) -> bool:
    return _is_activation(module) or isinstance(module, nn.Dropout | nn.Identity)


def _described(module: nn.Module, names: Mapping[nn.Module, str]) -> str:
    return f"{names[module]} ({type(module).__name__})"
