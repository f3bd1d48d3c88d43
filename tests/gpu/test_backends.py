"""The CUDA backend on the cases of tests/unit/core/test_backends.py: it agrees with plain torch.

Also in Triton's interpreter on a CPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from griffin_core.backends.base import Backend
from griffin_core.backends.torch import TorchBackend
from tests import backend_cases
from tests.backend_cases import CASES, LONG_STEPS, SPECS, STEPS, Numbers
from tests.gpu.devices import DEVICE, INTERPRETED, needs_triton
from tests.poison import poison

pytestmark = [
    pytest.mark.gpu,
    needs_triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the interpreter's floats
]

if DEVICE is not None:
    from griffin_core.backends.cuda.backend import CudaBackend, cuda_backend

DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisoned memory; and in the interpreter a device of two multiprocessors."""
    poison(monkeypatch)
    if INTERPRETED:
        properties = SimpleNamespace(multi_processor_count=2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def backend_of(dtype: torch.dtype) -> Backend:
    return cuda_backend(torch.device(str(DEVICE)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_an_operation_is_plain_torchs_in_float32(case: str, dtype: torch.dtype) -> None:
    backend_cases.check(CASES[case], backend_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [STEPS, LONG_STEPS], ids=["few", "many"])
@pytest.mark.parametrize("name", SPECS)
@torch.inference_mode()
def test_several_new_tokens_attend_as_that_many_steps_do(
    name: str, steps: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    run = backend_of(dtype)
    together = backend_cases.decode_attention(name, steps)(run, Numbers.of(run, dtype))
    alone = backend_cases.decode_attention_by_token(name, steps)(run, Numbers.of(run, dtype))
    for got, exact in zip(together, alone, strict=True):
        backend_cases.close(got, exact, dtype)


def test_the_same_requests_draw_the_same_tokens() -> None:
    plain = TorchBackend(torch.device("cpu"), torch.float32)
    assert backend_cases.draws(backend_of(DTYPES[0])) == backend_cases.draws(plain)


def test_half_precision_has_kernels_and_can_be_captured() -> None:
    assert isinstance(backend_of(torch.float16), CudaBackend)
    assert backend_of(torch.float16).captures and not backend_of(torch.float32).captures
