"""All of the model from the file, or no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from griffin_core.errors import BadModelFile, ModelNotFound
from griffin_core.model.checkpoint import LEFT_OVER, STORED_DTYPES
from griffin_core.model.files import REFUSED_FILES
from griffin_core.model.load import load_model
from tests.references import assert_equal_or_refused

State = dict[str, Tensor]
FILE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copy(tiny_directory: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny llama to break."""
    return Path(shutil.copytree(tiny_directory("llama"), tmp_path / "model"))


def read(directory: Path) -> State:
    return {name: tensor.clone() for name, tensor in load_file(directory / FILE).items()}


def write(directory: Path, state: State, file: str = FILE) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, directory / file, {"format": "pt"})


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(directory: Path, *, allow_pickle: bool = False) -> str:
    with pytest.raises(BadModelFile) as caught:
        load_model(str(directory), dtype=torch.float32, allow_pickle=allow_pickle)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- tensors that are missing, too many or of another shape ----------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        UP,
        "lm_head.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ],
)
def test_a_missing_tensor_is_named_with_its_shape(name: str, copy: Path) -> None:
    state = read(copy)
    shape = list(state.pop(name).shape)
    write(copy, state)
    assert f"lacks tensors: {name} {shape}" in refusal(copy)


def test_ten_tensors_are_named_and_the_others_counted(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=5)
    said = refusal(copy)
    assert said.count("model.layers.") == 10
    assert said.endswith("and 8 more")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(16)),
        ("model.layers.0.mlp.experts.0.up_proj.weight", torch.zeros(88, 48)),
        ("model.layers.3.mlp.up_proj.weight", torch.zeros(88, 48)),
        ("v_head.weight", torch.zeros(1, 48)),
    ],
)
def test_a_tensor_that_the_model_does_not_take_is_named(
    name: str, tensor: Tensor, copy: Path
) -> None:
    write(copy, {**read(copy), name: tensor})
    said = refusal(copy)
    assert f"tensors that the model does not take: {name} {list(tensor.shape)} F32" in said


def test_biases_that_the_config_does_not_name_are_refused(
    tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tmp_path / "biased"
    shutil.copytree(tiny_directory("llama-biased-attention"), directory)
    edit_config(directory, attention_bias=False)
    said = refusal(directory)
    assert "model.layers.0.self_attn.k_proj.bias [32] F32" in said and "and 2 more" in said


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_tensor_that_is_stored_under_two_names_is_refused(prefix: str, copy: Path) -> None:
    state = read(copy)
    other = UP.removeprefix("model.") if prefix else f"model.{UP}"
    write(copy, {**state, other: torch.rand_like(state[UP])})
    assert "is stored twice" in refusal(copy)


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"vocab_size": 259}, "lm_head.weight [260, 48] for [259, 48]"),
        ({"intermediate_size": 96}, "mlp.down_proj.weight [48, 88] for [48, 96]"),
        ({"num_key_value_heads": 4}, "self_attn.k_proj.weight [32, 48] for [64, 48]"),
        ({"head_dim": 8}, "self_attn.q_proj.weight [64, 48] for [32, 48]"),
    ],
)
def test_other_shapes_than_the_config_says_are_named(
    changes: dict[str, object], shapes: str, copy: Path
) -> None:
    edit_config(copy, **changes)
    assert shapes in refusal(copy)


# -- quantized weights and adapters ----------------------------------------------------------------


def quantized(state: State, dtype: torch.dtype, scale: str) -> State:
    out: State = {}
    for name, weight in state.items():
        if "proj" not in name:
            out[name] = weight
            continue
        step = weight.abs().max() / 100
        out[name] = (weight / step).to(dtype)
        out[name.replace("weight", scale)] = step.reshape(1)
    return out


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
    ],
)
def test_weights_stored_in_a_type_of_quantization_are_refused_by_it(
    dtype: torch.dtype, stored: str, copy: Path
) -> None:
    write(copy, quantized(read(copy), dtype, "weight_scale"))
    said = refusal(copy)
    assert f" {stored}" in said and "allowed: F64, F32, F16, BF16" in said


@pytest.mark.parametrize(
    "name", ["weight_scale", "weight_scale_inv", "input_scale", "g_idx", "qzeros"]
)
def test_scales_beside_weights_are_refused(name: str, copy: Path) -> None:
    write(copy, {**read(copy), UP.replace("weight", name): torch.ones(1)})
    said = refusal(copy)
    assert "(of quantized weights or adapters?)" in said and name in said


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_a_file_that_says_that_weights_are_not_all_is_refused(name: str, copy: Path) -> None:
    (copy / name).write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert refusal(copy).startswith(f"{name} is next to the weights; ")


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ("quantization_config", {"load_in_4bit": True}, "load_in_4bit"),
        ("compression_config", {"format": "int-quantized"}, "int-quantized"),
        ("quantization", {"group_size": 64, "bits": 4}, "group_size"),
    ],
)
def test_a_config_that_says_how_weights_were_quantized_is_refused(
    field: str, value: object, shown: str, copy: Path
) -> None:
    edit_config(copy, **{field: value})
    said = refusal(copy)
    assert said.startswith(f"config.json, {field}: got ") and shown in said


# -- what loads as it did --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED_DTYPES.values())
def test_weights_in_any_float_type_load(dtype: torch.dtype, copy: Path) -> None:
    write(copy, {name: tensor.to(dtype) for name, tensor in read(copy).items()})
    assert assert_equal_or_refused(copy) is None


def test_names_without_the_prefix_load(copy: Path) -> None:
    write(copy, {name.removeprefix("model."): tensor for name, tensor in read(copy).items()})
    assert assert_equal_or_refused(copy) is None


def test_what_may_be_left_over_is_left_out(copy: Path) -> None:
    left = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.position_ids": torch.arange(256),
    }
    assert len(left) == len(LEFT_OVER)
    write(copy, {**read(copy), **left})
    assert assert_equal_or_refused(copy) is None


@pytest.mark.parametrize("changed", [False, True])
def test_a_head_in_the_file_of_a_tied_model_is_used_as_transformers_uses_it(
    changed: bool, copy: Path
) -> None:
    edit_config(copy, tie_word_embeddings=True)
    state = read(copy)
    if not changed:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    write(copy, state)
    assert assert_equal_or_refused(copy) is None


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_every_form_of_a_checkpoint_loads(form: str, shards: int, copy: Path) -> None:
    state = read(copy)
    (copy / FILE).unlink()
    stem, names = ("model" if form == "safetensors" else "pytorch_model"), sorted(state)
    weight_map = {}
    for shard in range(shards):
        part = {name: state[name] for name in names[shard::shards]}
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.{form}" if shards > 1 else f"{stem}.{form}"
        weight_map |= dict.fromkeys(part, file)
        if form == "bin":
            torch.save(part, copy / file)
        else:
            write(copy, part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (copy / f"{stem}.{form}.index.json").write_text(json.dumps(index))
    assert assert_equal_or_refused(copy) is None


def test_a_model_of_the_hub_is_read_from_its_cache(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants  # noqa: PLC0415

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--griffin-tests--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(copy, repository / "snapshots" / ("0" * 40))
    loaded = load_model("griffin-tests/tiny", dtype=torch.float32)
    assert loaded.name == "griffin-tests/tiny"
    assert loaded.fingerprint == load_model(str(copy), dtype=torch.float32).fingerprint
    with pytest.raises(ModelNotFound, match="cannot be fetched from the hub"):
        load_model("griffin-tests/other", dtype=torch.float32)


# -- files that cannot be read ---------------------------------------------------------------------


def test_a_shard_that_is_missing_is_named(copy: Path) -> None:
    (copy / FILE).rename(copy / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (copy / f"{FILE}.index.json").write_text(json.dumps(index))
    said = refusal(copy)
    assert said == f"{FILE}.index.json: files are missing: model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "["]
)
def test_an_index_that_is_none_is_named(index: str, copy: Path) -> None:
    (copy / FILE).unlink()
    (copy / f"{FILE}.index.json").write_text(index)
    assert refusal(copy).startswith(f"{FILE}.index.json: ")


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, b"PK\x03\x04"])
def test_a_weights_file_that_is_none_is_named(content: bytes, copy: Path) -> None:
    (copy / FILE).write_bytes(content)
    assert refusal(copy).startswith(f"{FILE}: cannot be read, truncated or damaged? (")


@pytest.mark.parametrize("name", [FILE, "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_told(name: str, copy: Path) -> None:
    (copy / FILE).unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (copy / name).write_text(pointer)
    assert refusal(copy, allow_pickle=True) == (
        f"{name}: is a Git LFS pointer, not the file; `git lfs pull` fetches the file"
    )


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"a": 1}])
def test_a_pickle_of_something_else_is_named(content: object, copy: Path) -> None:
    (copy / FILE).unlink()
    torch.save(content, copy / "pytorch_model.bin")
    said = refusal(copy, allow_pickle=True)
    assert said == "pytorch_model.bin: does not hold tensors by name"


@pytest.mark.parametrize("index_of", ["", "pytorch_model.bin", FILE], ids=["one", "bin", "mixed"])
def test_a_pickle_is_not_opened_unless_it_is_allowed(
    index_of: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not as a shard among others that are none."""
    state = read(copy)
    (copy / FILE).unlink()
    name = "pytorch_model-00002-of-00002.bin" if index_of else "pytorch_model.bin"
    names = sorted(state)
    first = names[:1] if index_of == FILE else []
    torch.save({name: state[name] for name in names[len(first) :]}, copy / name)
    if first:
        write(copy, {first[0]: state[first[0]]}, "a.safetensors")
    if index_of:
        weight_map = dict.fromkeys(names, name) | dict.fromkeys(first, "a.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (copy / f"{index_of}.index.json").write_text(json.dumps(index))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", None)
        assert refusal(copy) == (
            f"{name}: is a pickle, which is a program; allowed: safetensors. If you trust its "
            "author: `griffin serve` and `griffin check` with --allow-pickle, and LLM and "
            "load_model with allow_pickle=True"
        )
    if index_of != FILE:  # which transformers does not take either
        assert load_model(str(copy), dtype=torch.float32, allow_pickle=True).name == copy.name
