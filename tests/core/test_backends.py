"""Backends agree on each operation within the tolerance of the dtype, whatever lies in memory."""

from __future__ import annotations

import pytest
import torch

from griffin_core.backends.base import Backend
from griffin_core.backends.cpu.backend import CpuBackend
from griffin_core.backends.torch import TorchBackend
from tests import backend_cases
from tests.backend_cases import CASES, ERROR, LONG_STEPS, SPECS, STEPS, Numbers
from tests.poison import poison

BACKENDS = {"torch": TorchBackend, "cpu": CpuBackend}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def backend_of(kind: str, dtype: torch.dtype) -> Backend:
    return BACKENDS[kind](torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_an_operation_is_plain_torchs_in_float32(case: str, kind: str, dtype: torch.dtype) -> None:
    backend_cases.check(CASES[case], backend_of(kind, dtype))


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("steps", [STEPS, LONG_STEPS], ids=["few", "many"])
@pytest.mark.parametrize("name", SPECS)
@torch.inference_mode()
def test_several_new_tokens_attend_as_that_many_steps_do(
    name: str, steps: tuple[tuple[int, int], ...], kind: str, dtype: torch.dtype
) -> None:
    run = backend_of(kind, dtype)
    together = backend_cases.decode_attention(name, steps)(run, Numbers.of(run, dtype))
    alone = backend_cases.decode_attention_by_token(name, steps)(run, Numbers.of(run, dtype))
    for got, exact in zip(together, alone, strict=True):
        backend_cases.close(got, exact, dtype)


@torch.inference_mode()
def test_the_same_requests_draw_the_same_tokens() -> None:
    plain, compiled = (backend_cases.draws(backend_of(kind, torch.float32)) for kind in BACKENDS)
    assert compiled == plain
