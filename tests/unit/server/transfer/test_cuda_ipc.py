"""Exported GPU memory, without a GPU: what is refused before the driver is asked for a copy."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from griffin.v1 import prefill_pb2 as pb
from griffin_server.transfer import cuda_ipc
from griffin_server.transfer.cuda_ipc import Imports, IpcError

BASE, SIZE = 1 << 20, 2048
CPU = torch.device("cpu")  # stands for a GPU: the driver is not there either


class Handle:
    reserved = b""


class Driver:
    """Stands for the driver's bindings; every handle opens SIZE bytes at BASE."""

    CUipcMemHandle = Handle
    CUipcMem_flags = SimpleNamespace(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS=SimpleNamespace(value=1))
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_UNIFIED=4)
    CUDA_MEMCPY2D = SimpleNamespace
    CUresult = SimpleNamespace(CUDA_SUCCESS=0)

    def __init__(self) -> None:
        self.called: list[str] = []
        self.answers: dict[str, tuple[Any, ...]] = {
            "cuDevicePrimaryCtxRetain": (0, "context"),
            "cuIpcOpenMemHandle": (0, BASE),
            "cuMemGetAddressRange": (0, BASE, SIZE),
        }
        """What calls return: an error, or 0, and values."""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.called.append(name)
            return self.answers.get(name, (0,))

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=made))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return made


@pytest.fixture
def called(driver: Driver) -> list[str]:
    """Names of the driver's calls."""
    return driver.called


def location(offset: int, pitch: int, handle: bytes = bytes(64)) -> pb.CudaPlace:
    return pb.CudaPlace(handle=handle, offset_bytes=offset, pitch_bytes=pitch)


@pytest.mark.parametrize(
    ("offset", "pitch", "rows"),
    [(0, 512, 4), (1536, 512, 1), (0, 0, 4), (1024, 1024, 1), (512, 0, 3)],
)
def test_rows_inside_the_exported_memory_are_copied(
    called: list[str], offset: int, pitch: int, rows: int
) -> None:
    Imports(CPU).copy(
        location(offset, pitch), torch.empty(rows * 512, dtype=torch.uint8), rows=rows
    )
    assert called[-2:] == ["cuMemcpy2DAsync", "cuCtxPopCurrent"]


@pytest.mark.parametrize(
    ("offset", "pitch", "rows"),
    [(0, 512, 5), (1537, 512, 1), (0, 0, 5), (0, 1024, 3), (2048, 0, 1), (1 << 62, 0, 1)],
)
def test_rows_outside_it_are_not(called: list[str], offset: int, pitch: int, rows: int) -> None:
    """A pitch of less than a row would let the driver read rows one after the other."""
    out = torch.empty(rows * 512, dtype=torch.uint8)
    with pytest.raises(IpcError, match="outside 2048 exported bytes"):
        Imports(CPU).copy(location(offset, pitch), out, rows=rows)
    assert "cuMemcpy2DAsync" not in called


def test_a_handle_is_opened_once_and_closed_once(called: list[str]) -> None:
    imports = Imports(CPU)
    for _ in range(3):
        imports.copy(location(0, 512), torch.empty(512, dtype=torch.uint8), rows=1)
    assert called.count("cuIpcOpenMemHandle") == 1
    imports.close()
    imports.close()
    assert called.count("cuIpcCloseMemHandle") == 1


def test_what_was_opened_is_closed_even_if_its_size_is_not_known(driver: Driver) -> None:
    driver.answers["cuMemGetAddressRange"] = (SimpleNamespace(name="CUDA_ERROR_UNKNOWN"),)
    imports = Imports(CPU)
    with pytest.raises(IpcError, match="UNKNOWN"):
        imports.copy(location(0, 512), torch.empty(512, dtype=torch.uint8), rows=1)
    imports.close()
    assert "cuIpcCloseMemHandle" in driver.called


def test_memory_is_shared_on_no_cpu() -> None:
    assert not cuda_ipc.can_share(torch.device("cpu"))
