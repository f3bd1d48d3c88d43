"""What ``griffin calibrate`` measures, writes and chooses, and who reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from griffin_core.calibration import calibrate as module
from griffin_core.calibration.calibrate import calibrate
from griffin_core.calibration.recipes import (
    CANDIDATES,
    PLAIN,
    best_of,
    compare,
    divergences,
)
from griffin_core.calibration.sensitivity import neuron_means
from griffin_core.errors import BadModelFile, InvalidRequest
from griffin_core.hf_blocks import find_blocks
from griffin_core.model.calibration_file import find_calibration, write_calibration
from griffin_core.model.load import Model, load_model
from griffin_core.spec.calibration import Recipe
from griffin_core.spec.choices import DEFAULT_MODEL
from tests.calibrations import made_up

WINDOWS = [[(7 * n + k * n * n) % 250 for n in range(30)] for k in (1, 2, 3)]
TEXTS = [f"{letter} brown fox jumps over the lazy dog. " * 3 for letter in "ABCDEFGH"]


@pytest.fixture
def copy(tiny_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model's directory, and short windows."""
    monkeypatch.setattr(module, "GRADIENT_TOKENS", 40)
    monkeypatch.setattr(module, "PROMPT_TOKENS", 60)
    monkeypatch.setattr(module, "SCORED_TOKENS", 20)
    return tiny_directory("llama")


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_sensitivity_is_the_mean_square_of_each_tokens_gradient(
    name: str, tiny_directory: Callable[[str], Path]
) -> None:
    """Against finite differences of the log-likelihood in one activation."""
    model = AutoModelForCausalLM.from_pretrained(tiny_directory(name), dtype=torch.float64)
    model.eval().requires_grad_(False)
    window, layer, neuron = WINDOWS[0][:6], 1, 17
    found = neuron_means(model, [window], seed=3)

    down = find_blocks(model)[layer].down
    ids = torch.tensor([window])
    logits = model(input_ids=ids).logits[0].float()
    generator = torch.Generator().manual_seed(3)
    drawn = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)

    def likelihood(token: int, step: float) -> float:
        def nudge(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            z = args[0].clone()
            z.reshape(-1, z.shape[-1])[token, neuron] += step
            return (z, *args[1:])

        hook = down.register_forward_pre_hook(nudge)
        try:
            logprobs = model(input_ids=ids).logits[0].log_softmax(dim=1)
        finally:
            hook.remove()
        return float(logprobs.gather(1, drawn).sum())

    slopes = [(likelihood(t, 1e-4) - likelihood(t, -1e-4)) / 2e-4 for t in range(len(window))]
    exact = sum(slope**2 for slope in slopes) / len(window)
    assert float(found.sensitivity[layer, neuron]) == pytest.approx(exact, rel=1e-2)


def test_the_prior_is_the_mean_of_what_a_prefill_counts(
    tiny: Callable[[str], Model], tiny_directory: Callable[[str], Path]
) -> None:
    from griffin_core.experts.selection import Selection  # noqa: PLC0415
    from griffin_core.forward.prefill import launch  # noqa: PLC0415
    from griffin_core.forward.prompt import Part, Prompt  # noqa: PLC0415

    reference = AutoModelForCausalLM.from_pretrained(tiny_directory("llama"), dtype=torch.float32)
    reference.eval().requires_grad_(False)
    found = neuron_means(reference, WINDOWS)
    decoder = tiny("llama").decoder
    sums = torch.zeros(3, 3, 88)
    for window in WINDOWS:
        prompt = Prompt(decoder, window, Selection(density=1.0))
        (read,) = launch(decoder, [Part(prompt=prompt, tokens=len(window))]).end()
        sums += read.statistics.sums
    tokens = sum(map(len, WINDOWS))
    torch.testing.assert_close(found.mean_squares, sums[1] / tokens, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.means, sums[2] / tokens, rtol=1e-3, atol=1e-5)


def test_a_calibration_is_written_found_and_becomes_the_models_default(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_CACHE_DIR", str(tmp_path))
    told: list[tuple[str, int, int]] = []
    made = calibrate(
        str(copy), TEXTS, dtype=torch.float32, progress=lambda *each: told.append(each)
    )
    assert [done for _, done, _ in told] == list(range(1, told[-1][2] + 1))
    assert {what for what, _, _ in told} == {"sensitivities", "recipes"}
    assert made.path.parent == tmp_path / "calibrations"
    assert [each.recipe for each in made.compared] == list(CANDIDATES)
    for dtype in (torch.float32, torch.bfloat16):  # the same weights, whatever they are loaded as
        loaded = load_model(str(copy), dtype=dtype)
        found = loaded.decoder.calibration
        assert found is not None and found.digest == made.calibration.digest
        assert found.recipe == made.calibration.recipe
        assert torch.equal(found.sensitivity, made.calibration.sensitivity)
    assert load_model(str(copy), calibration="none").decoder.calibration is None
    given = load_model(str(copy), calibration=str(made.path)).decoder.calibration
    assert given is not None and given.digest == made.calibration.digest


def test_the_packaged_model_comes_with_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = load_model(DEFAULT_MODEL, dtype=torch.bfloat16)
    monkeypatch.setenv("GRIFFIN_CACHE_DIR", str(tmp_path))  # an empty cache: no calibration
    key, spec = loaded.calibration_key, loaded.decoder.spec
    found = find_calibration(None, key, spec, torch.device("cpu"))
    assert found is not None
    assert found.recipe == Recipe(policy="sensitive", correction="residual", rank=64)


def test_recipes_are_compared_in_pairs_and_plain_topk_stays_where_nothing_beats_it() -> None:
    other = Recipe(policy="sensitive", correction="bias")
    windows = [{PLAIN: kl, other: kl - gain} for kl, gain in ((1.0, 0.3), (3.0, 0.5), (2.0, 0.4))]
    plain, better = compare(windows, PLAIN)
    assert (plain.change, plain.change_error) == (0, 0)
    assert better.kl == pytest.approx(1.6) and better.change == pytest.approx(-0.2)
    assert better.change_error == pytest.approx(0.1 / 3**0.5 / 2)
    assert best_of([plain, better]) == other
    doubtful = replace(better, change=-0.2, change_error=0.11)
    assert best_of([plain, doubtful]) == PLAIN


def test_divergence_of_all_neurons_is_nothing(tiny: Callable[[str], Model]) -> None:
    decoder = tiny("llama").decoder
    window = [(11 * n + n * n) % 250 for n in range(90)]
    found = divergences(decoder, window, 70, density=0.5)
    assert set(found) == set(CANDIDATES) and min(found.values()) > 0
    nearly = divergences(decoder, window, 70, density=0.99)
    assert max(nearly.values()) < min(found.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 1.0}, r"density: got 1\.0; allowed: \(0, 1\)"),
        ({"density": float("nan")}, "density: got nan"),
        ({"texts": TEXTS[:2]}, "text: got 2 windows to fit and 1 to hold out, of 2 texts"),
        ({"texts": ["short"] * 20}, "text: got 0 windows"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    copy: Path, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    texts = options.pop("texts", TEXTS)
    with pytest.raises(InvalidRequest, match=words):
        calibrate(str(copy), texts, output=tmp_path / "out", dtype=torch.float32, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t, m: m.update(griffin_calibration="2"), "format '2'; allowed: 1"),
        (lambda t, m: m.update(key="f" * 32), "it is of the model 'ffff"),
        (lambda t, m: m.update(recipe="{"), "Expecting"),
        (lambda t, m: m.update(recipe='{"policy": "topk"}'), "no entry 'correction'"),
        (
            lambda t, m: m.update(
                recipe=json.dumps({"policy": "best", "correction": "bias", "rank": 0})
            ),
            "recipe: got 'best'",
        ),
        (
            lambda t, m: m.update(
                recipe=json.dumps({"policy": "topk", "correction": "residual", "rank": "64"})
            ),
            "got rank '64'",
        ),
        (lambda t, m: t.pop("means"), "means"),
        (lambda t, m: t.update(means=t["means"][:, :-1].contiguous()), r"means: got \(3, 87\)"),
        (lambda t, m: t["sensitivity"].fill_(torch.nan), "sensitivity: got"),
    ],
)
def test_a_file_that_is_none_of_this_model_is_refused_by_name(
    spoil: Callable[[dict[str, torch.Tensor], dict[str, str]], object],
    words: str,
    tiny: Callable[[str], Model],
    tmp_path: Path,
) -> None:
    model, path = tiny("llama"), tmp_path / "some.safetensors"
    write_calibration(path, made_up(3, 88), model.calibration_key, {})
    tensors = load_file(path)
    recipe = {"policy": "topk", "correction": "bias", "rank": 0}
    about = {
        "griffin_calibration": "1",
        "key": model.calibration_key,
        "recipe": json.dumps(recipe),
    }
    save_file(tensors, path, about)
    spec = model.decoder.spec
    assert find_calibration(str(path), model.calibration_key, spec, torch.device("cpu"))
    spoil(tensors, about)
    save_file(tensors, path, about)
    with pytest.raises(BadModelFile, match=words) as caught:
        find_calibration(str(path), model.calibration_key, spec, torch.device("cpu"))
    assert re.match(r"calibration .*some\.safetensors: ", str(caught.value))


@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file", b"\xff" * 100])
def test_a_file_that_cannot_be_read_is_refused_by_name(
    content: bytes | None, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    model, path = tiny("llama"), tmp_path / "some.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadModelFile, match=r"some\.safetensors"):
        find_calibration(str(path), model.calibration_key, model.decoder.spec, torch.device("cpu"))
