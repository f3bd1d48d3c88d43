"""What many tests of the core run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from griffin_core.engine.engine import Engine
from griffin_core.model.load import Model
from tests.unit.core.engines import engine


@pytest.fixture
def model(tiny: Callable[[str], Model]) -> Model:
    return tiny("llama")


@pytest.fixture
def running(model: Model) -> Iterator[Engine]:
    with engine(model, prefill_source=None) as started:
        yield started
