"""`griffin calibrate`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from griffin_core.model.load import load_model
from griffin_server.commands import app


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Options that name two files of several pieces each."""
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for number, file in enumerate(files):
        words = [f"{number} fox {n * n % 97} jumps" for n in range(900)]
        file.write_text(" ".join(words))
    return [word for file in files for word in ("--text", str(file))]


def test_what_it_measures_is_printed_and_the_best_recipe_written(
    tiny_directory: Callable[[str], Path], texts: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "made" / "calibration.safetensors"
    where = str(tiny_directory("opt"))
    common = (where, *texts, "--dtype", "float32", "--output", str(output))
    status, out, _ = run(*common, "--json")
    assert status == 0
    said = json.loads(out)
    assert said["path"] == str(output) and said["windows"] >= 2
    assert said["compared"][0]["recipe"] == {"policy": "topk", "correction": "none", "rank": 0}
    loaded = load_model(where, dtype=torch.bfloat16, calibration=str(output))
    assert loaded.decoder.calibration_digest == said["digest"]
    assert oct(output.stat().st_mode & 0o444) == "0o444"  # for the servers' users too
    status, out, _ = run(*common)
    assert status == 0
    for words in ("topk_budgets", "residual 64", "KL to dense", "the model's default"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--density", "1.5"], "density: got 1.5; allowed: (0, 1)"),
        (["--dtype", "int4"], "dtype: got int4; allowed: auto, float32"),
        (["--text", "/no/such/file"], "text: got /no/such/file; allowed: a text file in UTF-8"),
        (["--device", "cuda:9"], "device: got cuda:9"),
    ],
)
def test_bad_options_are_refused_by_name(
    arguments: list[str], words: str, tiny_directory: Callable[[str], Path]
) -> None:
    status, _, err = run(str(tiny_directory("llama")), *arguments)
    assert status == 1
    assert words in " ".join(err.split())
