"""Models for all tests: tiny random ones of each family, and the real SmolLM2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import griffin_core  # noqa: F401  # before torch, so that its threads wait for one another briefly

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub

import pytest
import torch

from griffin_core.model.hub import DEFAULT_MODEL
from griffin_core.model.load import Model, load_model
from tests.otlp import Receiver
from tests.servers import Running, running
from tests.tiny import make_tiny

# Tiny models are fastest on one thread: two wait for each other longer than they work, and longest
# where the CPUs have other work. Tests of threads set their own number.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of ``tests.tiny.MODELS`` -> its directory, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def tiny(tiny_directory: Callable[[str], Path]) -> Callable[[str], Model]:
    """Name of ``tests.tiny.MODELS`` -> the model in float32, loaded once."""
    loaded: dict[str, Model] = {}

    def load(name: str) -> Model:
        if name not in loaded:
            loaded[name] = load_model(str(tiny_directory(name)), dtype=torch.float32)
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """SmolLM2-135M-Instruct in float32."""
    return load_model(DEFAULT_MODEL, dtype=torch.float32)


@pytest.fixture(params=["untraced", "traced"])
def with_and_without_traces(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    """Runs a test twice: its servers send traces the second time. Whether they do."""
    if request.param == "untraced":
        yield False
        return
    with Receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        yield True
        assert receiver.spans


@pytest.fixture(scope="module")
def tiny_server(tiny: Callable[[str], Model]) -> Iterator[Running]:
    """A server in role all with a tiny llama, which serves PrefillService as well."""
    with running(tiny("llama"), prefill_host="127.0.0.1", prefill_port=0) as server:
        yield server


@pytest.fixture(scope="module")
def smollm2_server(smollm2: Model) -> Iterator[Running]:
    """A server in role all with SmolLM2 in float32."""
    with running(smollm2) as server:
        yield server
