"""A fingerprint differs with whatever changes a model's computation, and with nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from griffin_core.model.fingerprint import canonical, fingerprint
from griffin_core.model.load import Model
from griffin_core.spec.model import LayerSpec, ModelSpec
from griffin_core.spec.rope import RotarySpec

OTHER: dict[str, Any] = {
    "family": "another",
    "layers": (LayerSpec(window=3, rotary=0),),
    "rotaries": (RotarySpec(inverse_frequencies=(0.5,)),),
    "norm": "layer",
    "activation": "relu",
    "attention_softcap": 30.0,
    "logit_softcap": 30.0,
}


def changed(value: Any, name: str) -> Any:
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * (1 + 2**-52) + 2**-60


@pytest.fixture
def spec(tiny: Callable[[str], Model]) -> ModelSpec:
    return tiny("llama").decoder.spec


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ModelSpec)])
def test_every_field_of_the_spec_counts(name: str, spec: ModelSpec) -> None:
    other = dataclasses.replace(spec, **{name: changed(getattr(spec, name), name)})
    assert canonical(other) != canonical(spec)


@pytest.mark.parametrize(
    "rotary",
    [
        RotarySpec(inverse_frequencies=(0.5, 0.25), scale=1.0),
        RotarySpec(inverse_frequencies=(0.5, 0.125), scale=1.0),
        RotarySpec(inverse_frequencies=(0.5, 0.25), scale=1.0 + 2**-52),
    ],
)
def test_every_field_of_its_parts_counts(rotary: RotarySpec, spec: ModelSpec) -> None:
    base = dataclasses.replace(
        spec, rotaries=(RotarySpec(inverse_frequencies=(0.5, 0.2), scale=1.0),)
    )
    assert canonical(dataclasses.replace(spec, rotaries=(rotary,))) != canonical(base)
    names = {field.name for kind in (LayerSpec, RotarySpec) for field in dataclasses.fields(kind)}
    assert names == {"window", "rotary", "inverse_frequencies", "scale"}, "canonical knows these"


def test_the_serialization_is_fixed() -> None:
    """Names and order are part of the wire: servers of two releases compare what comes of them."""
    spec = ModelSpec(
        family="llama",
        layers=(LayerSpec(window=None, rotary=0),),
        rotaries=(RotarySpec(inverse_frequencies=(1.0, 0.5)),),
        hidden_size=8,
        intermediate_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=32,
        context_length=64,
        embedding_size=8,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated=True,
        query_scale=0.5,
    )
    assert fingerprint(spec, {"w": torch.arange(6.0).view(2, 3)}) == EXPECTED


def test_every_tensor_counts(spec: ModelSpec) -> None:
    state = {"a": torch.zeros(4), "b": torch.ones(2, 3)}
    made = {
        fingerprint(spec, each)
        for each in (
            state,
            {"a": torch.zeros(4), "c": torch.ones(2, 3)},
            {"a": torch.zeros(4), "b": torch.ones(3, 2)},
            {"a": torch.zeros(4), "b": torch.ones(2, 3).half()},
            {"a": torch.zeros(4), "b": torch.full((2, 3), 2.0)},
        )
    }
    assert len(made) == 5


EXPECTED = "2c104b7f0b4a51dfed210fca422354f4ed48d509c28e4577e8905f1667a8349e"
