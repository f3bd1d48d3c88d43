"""Every field of every family's config: equal to transformers, or refused by its name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from griffin_core.model.families.config_fields import NEUTRAL
from griffin_core.model.families.registry import FAMILIES, examine_config
from tests.references import assert_equal_or_refused
from tests.tiny import MODELS, roughen

FAST_SHARE = 30
"""One of so many cases runs in every test run, the others with the slow tests."""

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "original_max_position_embeddings": 16,
}
_ROPES: tuple[Any, ...] = (
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 10000},
    {"rope_type": "default", "rope_theta": 0.0},
    {"rope_type": "default", "rope_theta": "10000"},
    {"rope_type": "default", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 0.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": "4"},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.5},
    {"type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {"type": "mrope", "rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    _LLAMA3,
    {**_LLAMA3, "factor": None},
    {**_LLAMA3, "high_freq_factor": 1.0},
    _YARN,
    {**_YARN, "original_max_position_embeddings": 16},
    {**_YARN, "original_max_position_embeddings": 16, "attention_factor": 1.5},
    {**_YARN, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.9},
    {**_YARN, "original_max_position_embeddings": 16, "beta_fast": 8, "beta_slow": 2},
    {**_YARN, "original_max_position_embeddings": 16, "truncate": False},
    {**_YARN, "original_max_position_embeddings": 16, "finetuned": True},
    {**_YARN, "llama_4_scaling_beta": 0.1},
    _LONG,
    {**_LONG, "original_max_position_embeddings": 256, "factor": 2.0},
    {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    {"rope_type": "unheard", "rope_theta": 10000.0},
)

VALUES: dict[str, tuple[Any, ...]] = {
    "vocab_size": (300, 0),
    "hidden_size": (64, 50),
    "intermediate_size": (96, 40),
    "ffn_dim": (96, 40),
    "word_embed_proj_dim": (32, 64),
    "num_hidden_layers": (2, 0),
    "num_attention_heads": (2, 5),
    "num_key_value_heads": (1, 3),
    "head_dim": (8, 15),
    "hidden_act": ("relu", "gelu", "gelu_new", "tanh", "quick_gelu"),
    "hidden_activation": ("relu", "gelu", "silu", "tanh"),
    "activation_function": ("gelu", "silu", "tanh"),
    "max_position_embeddings": (128, 20, -1),
    "rms_norm_eps": (1e-2, 0.0, -1.0, 1),
    "rope_parameters": _ROPES,
    "sliding_window": (3, None, 0),
    "max_window_layers": (1, 2),
    "layer_types": (
        ["full_attention"] * 3,
        ["sliding_attention"] * 3,
        ["full_attention"] * 2,
        ["chunked_attention"] * 3,
        ["linear_attention"] * 3,
    ),
    "query_pre_attn_scalar": (16, 0),
    "final_logit_softcapping": (5.0, None, 0.0),
    "attn_logit_softcapping": (5.0, None, 0.0),
    "initializer_range": (0.1, 0.2),
    "init_std": (0.1, 0.2),
    "pad_token_id": (0, 7),
    "bos_token_id": (1, 259),
    "eos_token_id": (3, [3, 4]),
    "pretraining_tp": (2, 4),
    "chunk_size_feed_forward": (1, 8),
    "dtype": ("float16", "bfloat16"),
    "architectures": (["LlamaForSequenceClassification"], []),
    "transformers_version": ("4.0.0", "9.9.9"),
    "id2label": ({"0": "a"}, {"0": "a", "1": "b", "2": "c"}),
    "label2id": ({"a": 0}, {"a": 0, "b": 1}),
    "problem_type": ("regression", "multi_label_classification"),
}
"""Field -> values other than the default. Flags are turned, floats of training are made larger."""

EXTRAS: dict[str, tuple[Any, ...]] = {
    "rope_theta": (500.0, 1e6),
    "rope_scaling": (
        {"type": "linear", "factor": 2.0},
        {**_LLAMA3, "rope_type": "llama3"},
        {"type": "su", "factor": 2.0},
    ),
    "rope_local_base_freq": (500.0, 2000.0),
    "partial_rotary_factor": (0.5, 1.0),
    "original_max_position_embeddings": (32, 64),
    "sliding_window": (3, 1000),
    "sliding_window_pattern": (2, 3),
    "layer_types": (["full_attention"] * 3, ["sliding_attention"] * 3),
    "is_causal": (False, True),
    "use_bidirectional_attention": (True, False),
    "per_layer_config": ({"0": {"intermediate_size": 40}}, {"1": {"num_key_value_heads": 4}}),
    "torch_dtype": ("float16", "bfloat16"),
    "quantization": ({"group_size": 64, "bits": 4}, {}),
    "quantization_config": ({"quant_method": "fp8"}, {"bits": 4}),
    "transformers_weights": ("other.safetensors", None),
    "num_local_experts": (8, 0),
    "logit_scale": (0.5, 1.0),
    "attention_multiplier": (0.3, 1),
    "attn_implementation": ("flash_attention_2", "sdpa"),
    "auto_map": ({"AutoModelForCausalLM": "modeling.Mine"}, {}),
    "unsloth_fixed": (True, False),
    "temperature": (0.3, 2.0),
}
"""Names that the config classes lack, or take apart, and that config.json files have."""


def _values(family: str, field: dataclasses.Field[Any]) -> tuple[Any, ...]:
    if field.name == "rope_parameters" and family == "gemma3_text":  # one for each type of layers
        plain = {"rope_type": "default", "rope_theta": 500.0}
        return (
            *({"full_attention": rope, "sliding_attention": plain} for rope in _ROPES),
            {"full_attention": plain, "sliding_attention": _LLAMA3},
            {"sliding_attention": plain, "chunked_attention": plain},
            plain,
        )
    if field.name in VALUES:
        return VALUES[field.name]
    if "bool" in str(field.type):
        default = MODELS[family][1].get(field.name, field.default)
        return (not default,)
    assert "float" in str(field.type), f"{family}: {field.name} is new; give it values"
    return (0.5, 0.9)


def _cases() -> Iterator[tuple[str, str, Any]]:
    for family in FAMILIES:
        fields = dataclasses.fields(CONFIG_MAPPING[family])
        for field in fields:
            for value in _values(family, field):
                yield family, field.name, value
        for name, values in EXTRAS.items():
            if name not in {field.name for field in fields}:
                yield from ((family, name, value) for value in values)


CASES = list(_cases())


@pytest.fixture(scope="session")
def with_field(
    tiny_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, Any], Path]:
    """A tiny model of a family whose config says one thing more or otherwise. Its weights are made
    for that config, if transformers can make them; else they are those of the plain model."""
    path = tmp_path_factory.mktemp("fields") / "model"

    def make(family: str, name: str, value: Any) -> Path:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tiny_directory(family), path)
        said = {**json.loads((path / "config.json").read_text()), name: value}
        try:
            torch.manual_seed(3)
            config = CONFIG_MAPPING[family](**{k: v for k, v in said.items() if k != "model_type"})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            roughen(model)
            model.save_pretrained(path)
        except Exception:  # then the reference refuses, too
            pass
        (path / "config.json").write_text(json.dumps(said))
        return path

    return make


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        pytest.param(*case, marks=() if index % FAST_SHARE == 0 else pytest.mark.slow)
        for index, case in enumerate(CASES)
    ],
)
def test_a_field_is_followed_as_transformers_does_or_refused_by_its_name(
    family: str, name: str, value: Any, with_field: Callable[[str, str, Any], Path]
) -> None:
    refused = assert_equal_or_refused(with_field(family, name, value))
    if refused is not None:
        assert any(named in refused for named in (*_NAMED_BY.get(name, ()), name)), refused


_NAMED_BY: dict[str, tuple[str, ...]] = {
    "rope_parameters": ("rope_type",),
    "rope_scaling": ("rope_type", "rope_parameters"),
    "partial_rotary_factor": ("rope_parameters",),
    "layer_types": ("sliding_window", "ministral"),  # a mistral with layer types is a ministral
}
"""Where the field that is refused has another name than the one that was set."""


@pytest.mark.parametrize("family", FAMILIES)
def test_what_becomes_of_every_field_of_a_family_is_known(family: str) -> None:
    config = CONFIG_MAPPING[family](**MODELS[family][1])
    spec, uses = examine_config(config)
    assert spec.family == family
    assert {field.name for field in dataclasses.fields(config)} <= {use.name for use in uses}
    assert not [use for use in uses if use.use == "refused"]
    assert all(use.reason for use in uses if use.use == "ignored")
    # None passes for no better reason than that it is at its default.
    assert not [use.name for use in uses if use.reason == "the default"]


@pytest.mark.parametrize("window", [2, 3, 1000])
def test_a_window_of_a_llama_is_left_out_as_transformers_leaves_it_out(window: int) -> None:
    """Phi 3 made into a llama carries one."""
    config = CONFIG_MAPPING["llama"](**MODELS["llama"][1])
    object.__setattr__(config, "sliding_window", window)
    spec, uses = examine_config(config)
    assert [layer.window for layer in spec.layers] == [None] * len(spec.layers)
    assert not [use for use in uses if use.use == "refused"]


SEEN_FIRST = {"per_layer_config", "quantization_config"}
"""Refused before any field is read; see EXTRAS."""


@pytest.mark.parametrize("name", sorted(NEUTRAL.keys() - SEEN_FIRST))
def test_a_mechanism_that_a_family_lacks_is_refused_by_its_name(name: str) -> None:
    config = CONFIG_MAPPING["opt"](**MODELS["opt"][1])
    object.__setattr__(config, name, "something")
    refused = [use for use in examine_config(config)[1] if use.use == "refused"]
    assert [use.name for use in refused] == [name]
