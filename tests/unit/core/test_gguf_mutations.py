"""Mutations of good GGUF files: each is what the same weights and config are in transformers, or it
is refused in one line and leaves nothing. There is no third outcome.

Two tensors of one shape that are exchanged are left out: nobody can see it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from transformers import AutoModelForCausalLM, PreTrainedModel

from griffin_core.errors import ModelError
from griffin_core.model.load import load_model
from tests.gguf_files import FAMILIES, LAYERS, Contents, contents_of, difference, tiny_model

MUTATIONS = 500
"""How many there are; `make test` runs the first of them, `make test-slow` the others."""
FAST = 30

BLOCKS = ("F16", "BF16", "Q8_0", "Q4_0", "Q5_1")


@dataclass
class Mutated:
    """What is to be written, and what has to come of it.

    Args:
        reference: the model that the file now describes; None if the file has to be refused.
        edit: a change of the bytes of the file.
        or_refused: whether a refusal is right as well.
    """

    contents: Contents
    reference: PreTrainedModel | None
    edit: Callable[[bytes], bytes] = lambda data: data
    or_refused: bool = False


@cache
def original(family: str) -> PreTrainedModel:
    return tiny_model(family)


def with_config(family: str, **changes: Any) -> PreTrainedModel:
    """The original weights under another config."""
    config = type(original(family).config).from_dict(
        {**original(family).config.to_dict(), **changes}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    state = dict(original(family).state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    model.load_state_dict(state, strict=False)
    return model


def tensor_dropped(rng: random.Random, family: str, contents: Contents) -> Mutated:
    name = rng.choice(list(contents.tensors))
    del contents.tensors[name]
    tied = name == "output.weight"
    return Mutated(contents, with_config(family, tie_word_embeddings=True) if tied else None)


def tensor_renamed(rng: random.Random, family: str, contents: Contents) -> Mutated:
    name = rng.choice(list(contents.tensors))
    to = rng.choice([f"x{name}", name.replace("weight", "w"), name.replace("blk.", "blk.1"), "a"])
    contents.tensors[f"{to}." if to == name else to] = contents.tensors.pop(name)
    return Mutated(contents, None)


def tensor_added(rng: random.Random, family: str, contents: Contents) -> Mutated:
    if contents.architecture == "llama" and rng.random() < 0.3:
        contents.tensors["rope_freqs.weight"] = np.ones(8, np.float32)
        return Mutated(contents, original(family))
    layer = rng.randrange(LAYERS + 2)
    part = rng.choice(["attn_sinks", "ffn_gate_exps", "attn_qkv", "layer_output_norm", "ffn_up.x"])
    contents.tensors[f"blk.{layer}.{part}.weight"] = np.ones((2, 32), np.float32)
    return Mutated(contents, None)


def tensor_reshaped(rng: random.Random, family: str, contents: Contents) -> Mutated:
    name = rng.choice(list(contents.tensors))
    values = contents.tensors[name]
    others = [
        values.reshape(-1),
        values.T,
        values[: len(values) // 2],
        np.concatenate([values, values]),
        values[None],
    ]
    contents.tensors[name] = rng.choice([v for v in others if v.shape != values.shape])
    return Mutated(contents, None)


def tensor_retyped(rng: random.Random, family: str, contents: Contents) -> Mutated:
    name = rng.choice([name for name, values in contents.tensors.items() if values.ndim > 1])
    kind = GGMLQuantizationType[rng.choice(BLOCKS)]
    contents.quantized[name] = kind
    rounded = dequantize(quantize(contents.tensors[name], kind), kind).copy()
    model = with_config(family)
    plain = contents_of(model)  # whose arrays are the weights, but where llama.cpp turns them
    turned = family in ("llama", "mistral") and (".attn_q." in name or ".attn_k." in name)
    if turned:
        heads = 4 if ".attn_q." in name else 2
        pairs = rounded.reshape(heads, len(rounded) // heads // 2, 2, -1)
        rounded = pairs.swapaxes(1, 2).reshape(rounded.shape)
        part = "q_proj" if heads == 4 else "k_proj"
        layer = model.model.layers[int(name.split(".")[1])]
        getattr(layer.self_attn, part).weight.data = torch.from_numpy(rounded.copy())
    else:
        plain.tensors[name][:] = rounded
    return Mutated(contents, model)


def key_changed(rng: random.Random, family: str, contents: Contents) -> Mutated:
    prefix = f"{contents.architecture}."
    name = rng.choice([name for name in contents.keys if name.startswith(prefix)])
    old, field = contents.keys[name], name.removeprefix(prefix)
    fields = {
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "context_length": "max_position_embeddings",
    }
    if rng.random() < 0.2:
        contents.keys[name] = rng.choice(["text", [1, 2], True, float("nan")])
        return Mutated(contents, None)
    new = old * rng.choice([2, 4]) if isinstance(old, int) else float(old * rng.choice([0.5, 3, 9]))
    contents.keys[name] = new
    if field in fields:
        return Mutated(contents, with_config(family, **{fields[field]: new}))
    if field == "rope.freq_base":
        return Mutated(contents, with_config(family, rope_parameters=_theta(family, new, None)))
    if field == "rope.freq_base_swa":
        return Mutated(contents, with_config(family, rope_parameters=_theta(family, None, new)))
    return Mutated(contents, None)


def _theta(family: str, theta: float | None, local: float | None) -> dict[str, Any]:
    rope: dict[str, Any] = original(family).config.to_dict()["rope_parameters"]
    if family != "gemma3_text":
        return {**rope, "rope_theta": theta}
    full, sliding = rope["full_attention"], rope["sliding_attention"]
    return {
        "full_attention": {**full, "rope_theta": theta or full["rope_theta"]},
        "sliding_attention": {**sliding, "rope_theta": local or sliding["rope_theta"]},
    }


def key_dropped(rng: random.Random, family: str, contents: Contents) -> Mutated:
    name = rng.choice(list(contents.keys))
    del contents.keys[name]
    same = (
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "vocab_size",
        "token_type",
        "add_space_prefix",
        "unknown_token_id",
    )
    if name.endswith(same) or (family == "gemma3_text" and name.endswith("freq_base_swa")):
        return Mutated(contents, original(family))
    # Gemma's merges do without scores; llama.cpp has defaults for tokens, and ends at known texts.
    if name.endswith(("bos_token_id", "eos_token_id", "scores")):
        return Mutated(contents, original(family), or_refused=True)
    if name.endswith("rope.freq_base") and family != "gemma3_text":
        return Mutated(contents, original(family))  # 10000, which it was
    if name.endswith("attention.sliding_window"):
        change: dict[str, Any] = {"sliding_window": 4096 if family == "gemma2" else None}
        if family == "gemma3_text":
            change = {"layer_types": ["full_attention"] * LAYERS}
        return Mutated(contents, with_config(family, **change))
    if name.endswith("logit_softcapping"):
        return Mutated(contents, original(family))  # llama.cpp's defaults are transformers'
    return Mutated(contents, None)


def key_added(rng: random.Random, family: str, contents: Contents) -> Mutated:
    if rng.random() < 0.3:
        name = rng.choice(["general.name", "somebody.key", "tokenizer.ggml.fim_sep_token_id"])
        contents.keys[name] = 7
        return Mutated(contents, original(family))
    where = rng.choice([f"{contents.architecture}.", "tokenizer.ggml.", "tokenizer."])
    contents.keys[f"{where}unheard_{rng.randrange(99)}"] = rng.choice([1, 0.5, "x", True, [1]])
    return Mutated(contents, None)


def tokenizer_changed(rng: random.Random, family: str, contents: Contents) -> Mutated:
    name = rng.choice(["tokens", "scores", "token_type", "eos_token_id", "model", "bos_token_id"])
    key = f"tokenizer.ggml.{name}"
    old = contents.keys[key]
    contents.keys[key] = old[:-1] if isinstance(old, list) else 10**6 if name != "model" else "?"
    if name.endswith("_token_id"):  # beyond the vocabulary: to llama.cpp as if it were not given
        return Mutated(contents, original(family), or_refused=True)
    return Mutated(contents, None)


def tensor_table_damaged(rng: random.Random, family: str, contents: Contents) -> Mutated:
    names = [name.encode() for name in contents.tensors]
    place, bit = rng.random(), 1 << rng.randrange(8)

    def edit(data: bytes) -> bytes:
        start = data.index(names[0]) - 8  # the length of the name is before it
        last = data.index(names[-1])
        dimensions = int.from_bytes(data[last + len(names[-1]) :][:4], "little")
        end = last + len(names[-1]) + 4 + 8 * dimensions + 4 + 8  # and type and offset behind it
        damaged = bytearray(data)
        damaged[start + int(place * (end - start))] ^= bit
        return bytes(damaged)

    return Mutated(contents, None, edit=edit)


def truncated(rng: random.Random, family: str, contents: Contents) -> Mutated:
    share = rng.random()
    return Mutated(contents, None, edit=lambda data: data[: int(share * (len(data) - 64))])


def doubled(rng: random.Random, family: str, contents: Contents) -> Mutated:
    return Mutated(contents, original(family), edit=lambda data: data + data, or_refused=True)


def halves_swapped(rng: random.Random, family: str, contents: Contents) -> Mutated:
    return Mutated(contents, None, edit=lambda d: d[len(d) // 2 :] + d[: len(d) // 2])


def header_swapped(rng: random.Random, family: str, contents: Contents) -> Mutated:
    architecture = rng.choice(sorted({a for a, _ in FAMILIES.values()} - {contents.architecture}))
    contents.architecture = architecture  # its keys keep the name of the other
    return Mutated(contents, None)


KINDS = (
    tensor_dropped,
    tensor_renamed,
    tensor_added,
    tensor_reshaped,
    tensor_retyped,
    key_changed,
    key_changed,
    key_dropped,
    key_dropped,
    key_added,
    tokenizer_changed,
    tensor_table_damaged,
    truncated,
    doubled,
    halves_swapped,
    header_swapped,
)


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=() if n < FAST else pytest.mark.slow) for n in range(MUTATIONS)],
)
def test_a_mutated_file_is_what_transformers_has_or_is_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE_DIR", str(tmp_path / "cache"))
    rng = random.Random(number)
    family, kind = rng.choice(list(FAMILIES)), KINDS[number % len(KINDS)]
    mutated = kind(rng, family, contents_of(with_config(family)))
    path = mutated.contents.write(tmp_path / "mutated.gguf")
    path.write_bytes(mutated.edit(path.read_bytes()))
    try:
        model = load_model(str(path), dtype=torch.float32)
    except ModelError as refused:
        assert mutated.reference is None or mutated.or_refused, str(refused)
        assert "\n" not in str(refused)
        assert not [left for left in (tmp_path / "cache").rglob("*") if left.is_file()]
        return
    assert mutated.reference is not None, f"{family}, {kind.__name__}: it loads"
    assert difference(model, mutated.reference) < 1e-4
