"""What many tests of the core run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from griffin_core.engine import memory
from griffin_core.engine.engine import Engine
from griffin_core.model.load import Model
from tests.unit.core.engines import engine


@pytest.fixture(autouse=True)
def no_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sessions of a tiny model are smaller than the host's objects for them, which count too.
    Tests reckon with the tensors alone."""
    monkeypatch.setattr(memory, "OBJECT_BYTES", 0)
    monkeypatch.setattr(memory, "TOKEN_BYTES", 0)


@pytest.fixture
def model(tiny: Callable[[str], Model]) -> Model:
    return tiny("llama")


@pytest.fixture
def running(model: Model) -> Iterator[Engine]:
    with engine(model, prefill_source=None) as started:
        yield started
