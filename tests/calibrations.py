"""Calibrations of tiny models, made up."""

from __future__ import annotations

import torch

from griffin_core.model.calibration_file import make_calibration
from griffin_core.model.decoder import Decoder
from griffin_core.spec.calibration import Calibration, Recipe


def made_up(
    layers: int,
    neurons: int,
    *,
    seed: int = 0,
    recipe: Recipe = Recipe(policy="topk", correction="bias"),  # noqa: B008  # frozen
    device: torch.device | None = None,
) -> Calibration:
    """A calibration of random values that differ by orders of magnitude, and from layer to
    layer."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((3, layers, neurons), generator=generator)
    scale = torch.linspace(1.0, -1.0, layers)[:, None]
    return make_calibration(
        sensitivity=(values[0] + scale).exp(),
        mean_squares=values[1].exp(),
        means=0.1 * values[2],
        recipe=recipe,
        device=device or torch.device("cpu"),
    )


def calibrate(decoder: Decoder, *, seed: int = 0) -> Calibration:
    """Gives a decoder a made-up calibration."""
    spec = decoder.spec
    decoder.calibration = made_up(
        len(spec.layers), spec.intermediate_size, seed=seed, device=decoder.device
    )
    return decoder.calibration
