"""What a model's generation_config.json says about sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from griffin_core.model.generation_config import load_generation_config, sampling_defaults
from griffin_core.model.load import Model


def defaults_of(directory: Path, **values: Any) -> dict[str, Any]:
    (directory / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    return dict(sampling_defaults(load_generation_config(str(directory))))


def test_a_model_without_the_file_has_no_sampling_defaults(tmp_path: Path) -> None:
    assert load_generation_config(str(tmp_path)) is None
    assert sampling_defaults(None) == {}


def test_fields_of_the_file_are_the_defaults_and_others_are_left_out(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    assert defaults_of(tmp_path, do_sample=True, max_new_tokens=9, **given) == given
    assert defaults_of(tmp_path, min_p=0.05) == {"min_p": 0.05}
    assert defaults_of(tmp_path, eos_token_id=[1, 2]) == {}


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({"do_sample": False, "temperature": 0.6}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.6}, 0.6),
        ({"temperature": 0.6}, 0.6),
    ],
)
def test_do_sample_decides_whether_a_model_is_greedy(
    given: dict[str, Any], temperature: float, tmp_path: Path
) -> None:
    assert defaults_of(tmp_path, **given) == {"temperature": temperature}


def test_the_packaged_model_has_no_sampling_defaults(smollm2: Model) -> None:
    assert smollm2.sampling_defaults == {}
