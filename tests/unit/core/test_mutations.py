"""Good model directories with one thing made wrong: as transformers has them, or refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.references import assert_equal_or_refused

MUTATIONS = 500
"""How many there are; one in ``FAST_SHARE`` of them runs in every test run."""
FAST_SHARE = 12

MODELS = (
    "llama",
    "mistral",
    "qwen2-sliding",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "opt",
    "llama3-rope",
)

WEIGHTS = "model.safetensors"
State = dict[str, Tensor]


def _write(directory: Path, state: State) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, directory / WEIGHTS, {"format": "pt"})


def _tensors(change: Callable[[State, str, random.Random], None]) -> Callable[..., None]:
    """A mutation of one tensor, drawn at random."""

    def mutate(directory: Path, draw: random.Random) -> None:
        state = {name: tensor.clone() for name, tensor in load_file(directory / WEIGHTS).items()}
        change(state, draw.choice(sorted(state)), draw)
        _write(directory, state)

    return mutate


def _drop(state: State, name: str, draw: random.Random) -> None:
    del state[name]


def _rename(state: State, name: str, draw: random.Random) -> None:
    renamed = draw.choice(
        [
            name.removeprefix("model."),
            f"model.{name}",
            name.replace(".0.", ".9."),
            name.replace("weight", "qweight"),
            name.replace("proj", "projection"),
            f"base_model.model.{name}",
            f"{name}.weight",
        ]
    )
    state[renamed] = state.pop(name)


def _add(state: State, name: str, draw: random.Random) -> None:
    stem = name.rsplit(".", 1)[0]
    added = draw.choice(
        [
            f"{stem}.bias",
            f"{stem}.weight_scale",
            f"{stem}.lora_A.weight",
            "model.layers.3.mlp.up_proj.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.embed_positions.position_ids",
            "layers.0.mlp.up_proj.weight",
            "lm_head.weight",
            "lm_head.bias",
            "v_head.summary.weight",
        ]
    )
    state[added] = torch.rand_like(state[name].float())


def _reshape(state: State, name: str, draw: random.Random) -> None:
    tensor = state[name]
    state[name] = draw.choice(
        [tensor[:-1], tensor.flatten(), tensor.unsqueeze(0), tensor[..., :-1], tensor.t()]
        if tensor.dim() == 2
        else [tensor[:-1], tensor.unsqueeze(0), tensor.repeat(2)]
    )


def _retype(state: State, name: str, draw: random.Random) -> None:
    types = ("float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")
    state[name] = state[name].to(getattr(torch, draw.choice([*types, "int64", "bool"])))


def _spoil(state: State, name: str, draw: random.Random) -> None:
    state[name].fill_(draw.choice([float("nan"), float("inf"), -float("inf")]))


def _change_key(directory: Path, draw: random.Random) -> None:
    path, said = _config(directory)
    key = draw.choice(sorted(said))
    value = said[key]
    if isinstance(value, bool):
        said[key] = not value
    elif isinstance(value, int):
        said[key] = draw.choice([0, 1, -1, value + 1, value - 1, 2 * value, value // 2, 10**6])
    elif isinstance(value, float):
        said[key] = draw.choice([0.0, -value, 2 * value, 1e30, float("nan")])
    elif isinstance(value, str):
        said[key] = draw.choice(["", value.upper(), "llama", "relu", "bfloat16", "x\ny"])
    elif isinstance(value, list):
        said[key] = draw.choice([value[:-1], value + value, value[::-1], []])
    elif isinstance(value, dict) and value:
        inner = draw.choice(sorted(value))
        said[key] = {**value, inner: draw.choice([0, 1.5, "default", None, -3, {}])}
    path.write_text(json.dumps(said))


def _add_key(directory: Path, draw: random.Random) -> None:
    path, said = _config(directory)
    names = ("sliding_window", "layer_types", "rope_scaling", "rope_theta", "head_dim", "is_causal")
    more = ("quantization_config", "mlp_bias", "attention_bias", "num_experts", "per_layer_config")
    others = ("attn_logit_softcapping", "final_logit_softcapping", "tie_word_embeddings", "foo_bar")
    values: list[Any] = [True, False, 0, 2, 0.5, "linear", ["full_attention"] * 3, {"factor": 2.0}]
    said[draw.choice([*names, *more, *others])] = draw.choice([*values, None])
    path.write_text(json.dumps(said))


def _drop_key(directory: Path, draw: random.Random) -> None:
    path, said = _config(directory)
    del said[draw.choice(sorted(said))]
    path.write_text(json.dumps(said))


def _retype_key(directory: Path, draw: random.Random) -> None:
    path, said = _config(directory)
    key = draw.choice(sorted(said))
    said[key] = draw.choice([str(said[key]), [said[key]], {"x": said[key]}, None, 1.5, True])
    path.write_text(json.dumps(said))


def _config(directory: Path) -> tuple[Path, dict[str, Any]]:
    path = directory / "config.json"
    return path, json.loads(path.read_text())


def _truncate(directory: Path, draw: random.Random) -> None:
    path = _file(directory, draw)
    whole = path.read_bytes()
    path.write_bytes(whole[: draw.choice([0, 1, 7, len(whole) // 2, len(whole) - 1])])


def _double(directory: Path, draw: random.Random) -> None:
    path = _file(directory, draw)
    path.write_bytes(path.read_bytes() * 2)


def _swap(directory: Path, draw: random.Random) -> None:
    one, other = _file(directory, draw), _file(directory, draw)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _remove(directory: Path, draw: random.Random) -> None:
    _file(directory, draw).unlink()


def _scribble(directory: Path, draw: random.Random) -> None:
    path = _file(directory, draw)
    content = bytearray(path.read_bytes())
    at = draw.randrange(min(400, len(content)))  # in the header of the weights
    content[at] = draw.randrange(256)
    path.write_bytes(content)


def _shard(directory: Path, draw: random.Random) -> None:
    """Sharded, and then rightly, or with something wrong between index and shards."""
    state = load_file(directory / WEIGHTS)
    names = sorted(state)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {name: file for half, file in zip(halves, files, strict=True) for name in half}
    wrong = draw.choice(["nothing", "no shard", "twice", "not in shard", "not in index", "no map"])
    if wrong == "twice":
        halves[1].append(halves[0][0])
    if wrong == "not in shard":
        halves[1].pop()
    if wrong == "not in index":
        del weight_map[names[0]]
    for half, file in zip(halves, files, strict=True):
        save_file({name: state[name] for name in half}, directory / file, {"format": "pt"})
    if wrong == "no shard":
        (directory / files[0]).unlink()
    index = {} if wrong == "no map" else {"metadata": {}, "weight_map": weight_map}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (directory / WEIGHTS).unlink()


def _pickle(directory: Path, draw: random.Random) -> None:
    state = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    content = draw.choice([state, {**state, "more": torch.ones(3)}, {"model": state}, [1, 2]])
    torch.save(content, directory / "pytorch_model.bin")


def _beside(directory: Path, draw: random.Random) -> None:
    names = ("adapter_config.json", "hf_quant_config.json", "quantize_config.json")
    (directory / draw.choice(names)).write_text("{}")


def _file(directory: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in directory.iterdir() if path.suffix != ".jinja"))


KINDS: tuple[Callable[[Path, random.Random], None], ...] = (
    *map(_tensors, (_drop, _rename, _add, _reshape, _retype, _spoil)),
    _change_key,
    _change_key,
    _change_key,
    _add_key,
    _drop_key,
    _retype_key,
    _retype_key,
    _truncate,
    _double,
    _swap,
    _remove,
    _scribble,
    _shard,
    _pickle,
    _beside,
)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=() if seed % FAST_SHARE == 0 else pytest.mark.slow)
        for seed in range(MUTATIONS)
    ],
)
def test_a_mutated_model_is_what_transformers_makes_of_it_or_is_refused(
    seed: int, tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    draw = random.Random(seed)
    mutate = KINDS[seed % len(KINDS)]
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory(draw.choice(MODELS)), directory)
    mutate(directory, draw)
    assert_equal_or_refused(directory)
