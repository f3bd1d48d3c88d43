"""A check of a model compares what it can, and says what it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from griffin_core.check import Report, check_model
from tests.gguf_files import contents_of, tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE_DIR", str(tmp_path / "cache"))


def check(path: Path, dtype: torch.dtype = torch.float32) -> Report:
    return check_model(str(path), dtype=dtype)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_a_good_directory_is_equal(name: str, tiny_directory: Callable[[str], Path]) -> None:
    report = check(tiny_directory(name))
    assert report.comparison is not None and report.comparison.equal
    assert report.comparison.agreeing == report.comparison.positions


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_in_bfloat16_no_more_than_rounding_differs(
    name: str, tiny_directory: Callable[[str], Path]
) -> None:
    comparison = check(tiny_directory(name), torch.bfloat16).comparison
    assert comparison is not None
    # Weights of tiny models are large, and round more than trained ones do.
    assert comparison.difference < 0.2 * comparison.largest


def test_a_gguf_file_is_compared_and_its_keys_are_told(tmp_path: Path) -> None:
    contents = contents_of(tiny_model("llama"))
    contents.keys |= {"general.sampling.temp": 0.5, "general.license": "mit"}
    report = check(contents.write(tmp_path / "tiny.gguf"))
    assert report.comparison is not None and report.comparison.equal
    assert report.gguf is not None
    assert report.gguf.keys["general.sampling.temp"] == ("0.5", "temperature of the sampling")
    assert "general.license" in report.gguf.ignored


def test_a_split_file_of_which_transformers_reads_one_part_is_not_compared(
    tmp_path: Path,
) -> None:
    whole = contents_of(tiny_model("llama"))
    names = list(whole.tensors)
    for number, some in enumerate((names[:10], names[10:])):
        part = replace(
            whole,
            keys={
                **(whole.keys if number == 0 else {}),
                "split.no": number,
                "split.count": 2,
                "split.tensors.count": len(names),
            },
            tensors={name: whole.tensors[name] for name in some},
        )
        part.write(tmp_path / f"tiny-{number + 1:05d}-of-00002.gguf")
    report = check(tmp_path / "tiny-00001-of-00002.gguf")
    assert report.comparison is None
    assert "it does not find " in report.not_compared
