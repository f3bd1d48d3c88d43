"""`griffin check`: what it says of a model, and its exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from griffin_core import check
from griffin_server.commands import app
from tests.gguf_files import contents_of, tiny_model


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_a_good_model_is_equal_and_what_was_understood_is_said(
    tiny_directory: Callable[[str], Path],
) -> None:
    status, out, _ = run(str(tiny_directory("gemma2")), "--json")
    said = json.loads(out)
    assert (status, said["status"], said["result"]) == (0, 0, "equal")
    assert said["family"] == "gemma2"
    assert said["config_read"]["query_pre_attn_scalar"] is not None
    assert said["config_ignored"]["attention_dropout"] == "training only"
    compared = said["compared"]
    assert compared["agreeing"] == compared["positions"] > 8
    assert 0 < compared["difference"] < 1e-4 < compared["largest"]


def test_text_for_people_has_the_same_in_words(tiny_directory: Callable[[str], Path]) -> None:
    status, out, err = run(str(tiny_directory("opt")))
    assert status == 0
    for words in ("family", "opt", "end tokens", "logits differ by at most", "equal"):
        assert words in out
    assert "it/s" not in err  # no bars of others


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types_are_equal_but_for_their_rounding(
    dtype: str, tiny_directory: Callable[[str], Path]
) -> None:
    status, out, _ = run(str(tiny_directory("llama")), "--dtype", dtype, "--json")
    assert (status, json.loads(out)["dtype"]) == (0, dtype)


def damaged(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def scaled(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "spiral", "rope_theta": 10000.0}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "named"),
    [(damaged, "model.layers.1.mlp.up_proj.weight"), (scaled, "spiral")],
)
def test_a_refused_model_is_one_line(
    change: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    contents_of(model).write(tmp_path / "good.gguf")
    model.save_pretrained(tmp_path)
    change(tmp_path)
    status, out, err = run(str(tmp_path))
    assert (status, out) == (1, "")
    assert named in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", [("--dtype", "float8"), ("--device", "tpu")])
def test_an_option_that_is_not_known_is_refused(
    option: tuple[str, str], tiny_directory: Callable[[str], Path]
) -> None:
    status, _, err = run(str(tiny_directory("llama")), *option)
    assert status == 1
    assert option[1] in err


def test_a_model_that_transformers_cannot_load_is_not_compared(tmp_path: Path) -> None:
    """Gemma's first generation as GGUF is none that transformers reads."""
    contents_of(tiny_model("gemma")).write(tmp_path / "gemma.gguf")
    status, out, _ = run(str(tmp_path / "gemma.gguf"), "--json")
    said = json.loads(out)
    assert status == said["status"] == 4
    assert "not compared: transformers says" in said["result"]
    assert said["gguf_keys_read"]["gemma.embedding_length"] == "hidden_size"


def test_a_difference_is_told_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents_of(tiny_model("llama")).write(tmp_path / "llama.gguf")
    load = AutoModelForCausalLM.from_pretrained

    def another(*arguments: Any, **options: Any) -> Any:
        reference, info = load(*arguments, **options)
        with torch.no_grad():
            reference.model.layers[2].mlp.down_proj.weight[3] += 0.5
        return reference, info

    assert run(str(tmp_path / "llama.gguf"))[0] == 0
    theirs = SimpleNamespace(from_pretrained=another)
    monkeypatch.setattr(check, "AutoModelForCausalLM", theirs)  # our own reading stays as it is
    status, out, _ = run(str(tmp_path / "llama.gguf"), "--json")
    said = json.loads(out)
    assert (status, said["result"]) == (3, "differs from transformers")
    assert said["compared"]["difference"] > 0.01
