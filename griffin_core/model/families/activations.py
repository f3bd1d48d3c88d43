"""The names of activation functions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from griffin_core.spec.model import Activation

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "relu": "relu",
    }
)
"""The name of an activation in transformers -> its name here."""
