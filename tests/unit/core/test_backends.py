"""Backends agree on each operation within the tolerance of the dtype, whatever lies in memory."""

from __future__ import annotations

import gc
from weakref import ref

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


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_pool_of_one_cache_is_freed_with_it_and_waits_for_no_collection(kind: str) -> None:
    """A prompt without a session has a pool of its own, on a GPU of gigabytes."""
    backend = backend_of(kind, torch.float32)
    gc.disable()
    try:
        cache = backend.new_pool(backend_cases.spec_of("llama"), 10).allocate(10)
        pool = ref(cache.pool)
        del cache
        assert pool() is None
    finally:
        gc.enable()
