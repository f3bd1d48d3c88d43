"""Tiny models of unit tests are calibrated, so that they run every policy. Those of end-to-end
tests are not: other processes load the same files."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from griffin_core.model.load import Model
from tests.calibrations import calibrate


@pytest.fixture(scope="session")
def tiny(tiny: Callable[[str], Model]) -> Callable[[str], Model]:
    """Name of ``tests.tiny.MODELS`` -> the model in float32, loaded and calibrated once."""

    def load(name: str) -> Model:
        model = tiny(name)
        if model.decoder.calibration is None:
            calibrate(model.decoder)
        return model

    return load
