"""Calibrates a model: sensitivities and prior from one half of the texts, the recipe from the
other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from griffin_core.calibration.recipes import (
    PLAIN,
    Compared,
    Progress,
    best_of,
    compare,
    divergences,
)
from griffin_core.calibration.sensitivity import neuron_means
from griffin_core.errors import CacheUnusable, InvalidRequest
from griffin_core.model.calibration_file import default_path, make_calibration, write_calibration
from griffin_core.model.files import local_directory
from griffin_core.model.hub import resolve
from griffin_core.model.load import load_model, quiet
from griffin_core.spec.calibration import Calibration, Recipe

GRADIENT_TOKENS = 256
"""Tokens of a window for the sensitivities: its memory grows with them, their number matters
little."""

PROMPT_TOKENS, SCORED_TOKENS = 256, 96
"""Prompt and scored tokens of a held-out window."""

MOST_WINDOWS = 32
"""The most windows of each kind."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What came of a calibration.

    Args:
        path: where it was written.
        compared: all recipes on the held-out windows.
        windows: the number of these.
    """

    path: Path
    calibration: Calibration
    compared: Sequence[Compared[Recipe]]
    windows: int


def calibrate(
    model: str,
    texts: Sequence[str],
    *,
    density: float = 0.5,
    output: Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    progress: Progress = lambda *_: None,
) -> Calibrated:
    """Calibrates a model and writes the file.

    Args:
        model, device, dtype: as for ``load_model``.
        texts: at least eight; every second one is held out.
        density: at which recipes are compared.
        output: the file; None for the place where ``load_model`` looks.

    Raises:
        ModelError: the model cannot be loaded.
        InvalidRequest: the density is out of range, or there is too little text.
        CacheUnusable: there is no place for the file, or it cannot be written.
    """
    if not 0 < density < 1:
        raise InvalidRequest("density", density, "(0, 1)")
    loaded = load_model(model, dtype=dtype, device=device, calibration="none")
    decoder, spec = loaded.decoder, loaded.decoder.spec
    path = output or default_path(loaded.calibration_key)
    if path is None:
        raise CacheUnusable("calibration: there is no home directory; allowed: an output file")
    before = loaded.tokenizer.encode("")
    encoded = [loaded.tokenizer.encode(text)[len(before) :] for text in texts]
    fitting = _windows(encoded[::2], before, GRADIENT_TOKENS)
    length = min(PROMPT_TOKENS + SCORED_TOKENS, spec.context_length)
    held_out = _windows(encoded[1::2], before, length)
    if len(fitting) < 2 or len(held_out) < 2:
        raise InvalidRequest(
            "text",
            f"{len(fitting)} windows to fit and {len(held_out)} to hold out, of {len(texts)} texts",
            f"at least 2 of {GRADIENT_TOKENS} and 2 of {length} tokens",
        )
    steps = len(fitting) + len(held_out)
    counted = iter(range(1, steps + 1))

    def done(what: str) -> None:
        progress(what, next(counted), steps)

    with quiet():
        directory = local_directory(model, resolve(model, decoder.dtype, lambda _: None))
        reference = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32 if decoder.device.type == "cpu" else decoder.dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        )
    reference.eval().requires_grad_(False).to(decoder.device)
    means = neuron_means(reference, fitting, done=lambda: done("sensitivities"))
    del reference

    def made(recipe: Recipe) -> Calibration:
        return make_calibration(
            sensitivity=means.sensitivity,
            mean_squares=means.mean_squares,
            means=means.means,
            recipe=recipe,
            device=decoder.device,
        )

    decoder.calibration = made(Recipe(policy="topk", correction="none"))
    by_window = []
    for window in held_out:
        by_window.append(divergences(decoder, window, length - SCORED_TOKENS, density))
        done("recipes")
    compared = compare(by_window, PLAIN)
    calibration = made(best_of(compared))
    report = {
        "model": loaded.name,
        "family": spec.family,
        "density": density,
        "windows": len(held_out),
        "prompt_tokens": length - SCORED_TOKENS,
        "scored_tokens": SCORED_TOKENS,
        "compared": [asdict(each) for each in compared],
    }
    try:
        write_calibration(path, calibration, loaded.calibration_key, report)
    except OSError as error:
        raise CacheUnusable(f"calibration: cannot write {path} ({error})") from error
    return Calibrated(path=path, calibration=calibration, compared=compared, windows=len(held_out))


def _windows(
    texts: Sequence[Sequence[int]], before: Sequence[int], tokens: int
) -> list[Sequence[int]]:
    """Cuts texts into windows without overlap, at most ``MOST_WINDOWS``. One window of each text
    comes first, so that a long text does not stand for all others.

    Args:
        before: the ids that the tokenizer puts before every text; each window begins with them.
        tokens: of a window, these included.
    """
    own = tokens - len(before)
    found: list[Sequence[int]] = []
    for number in range(max((len(text) // own for text in texts), default=0)):
        pieces = [text[number * own : (number + 1) * own] for text in texts]
        found += [[*before, *piece] for piece in pieces if len(piece) == own]
    return found[:MOST_WINDOWS]
