"""Memory of a GPU that one process lends and another maps: CUDA IPC, by the driver's own calls.

Torch's way to share tensors between processes keeps what it lent until the borrower says that it
is done; one that was killed never does. Here the lender decides, and the borrower must have copied
what it needs while the call between them is open.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from griffin.v1 import prefill_pb2 as pb

PROOF_BYTES = 16


class MappingError(ValueError):
    """Memory cannot be lent or mapped."""


@cache
def boot_id() -> str:
    """Names this boot of this host's kernel, the same in all its containers; "" if unknown."""
    with suppress(OSError):
        path = Path("/proc/sys/kernel/random/boot_id")
        return path.read_text(encoding="ascii").strip()
    return ""


def can_share(device: torch.device) -> bool:
    """Whether memory of this device may be lent and mapped; only a proof can tell that it will be.
    The driver's bindings come with torch's CUDA builds."""
    if device.type != "cuda" or not boot_id() or importlib.util.find_spec("cuda") is None:
        return False
    return importlib.util.find_spec("cuda.bindings") is not None


def place_of(x: Tensor) -> pb.CudaPlace:
    """Where the rows of a tensor lie: its last two dimensions are contiguous, and what is before
    them counts rows of one pitch.

    Raises:
        MappingError: its allocation cannot be lent (as those of expandable segments cannot).
    """
    with _current(x.device):
        base, _ = _call("cuMemGetAddressRange", x.data_ptr())
        (handle,) = _call("cuIpcGetMemHandle", base)
    pitch = x.stride(-3) * x.itemsize if x.ndim > 2 else x.nbytes
    return pb.CudaPlace(
        handle=bytes(handle.reserved), offset_bytes=x.data_ptr() - int(base), pitch_bytes=pitch
    )


@cache
def _proof(device: torch.device) -> tuple[bytes, Tensor]:
    """Random bytes of this process, and where they lie for as long as it runs: whoever reads them
    there sees its memory."""
    proof = secrets.token_bytes(PROOF_BYTES)
    lies = torch.frombuffer(bytearray(proof), dtype=torch.uint8).to(device)
    torch.cuda.synchronize(device)
    return proof, lies


class Lent:
    """What a sender lends for one call; it stays as it is while this object lives.

    Raises:
        MappingError: nothing can be lent here.
    """

    def __init__(self, device: torch.device) -> None:
        self.proof, lies = _proof(device)
        """Bytes that lie at ``proof_place``."""
        self.proof_place = place_of(lies)
        self._held: list[Tensor] = []

    def lend(self, x: Tensor) -> pb.CudaPlace:
        """Where a tensor lies that is lent from now on."""
        self._held.append(x)
        return place_of(x)


class Mappings:
    """What a receiver has mapped of other processes' memory into its GPU's addresses, until
    ``close``; that memory may be another GPU's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mapped: dict[bytes, int] = {}

    def copy(self, place: pb.CudaPlace, out: Tensor, *, rows: int) -> None:
        """Fills a contiguous tensor on the GPU with rows of other memory, on the current stream.

        Raises:
            MappingError: the memory cannot be mapped, or the rows are not in it.
        """
        driver = _driver()
        stream = torch.cuda.current_stream(self._device).cuda_stream
        width = out.nbytes // rows
        pitch = max(width, place.pitch_bytes)  # rows do not lie in one another
        with _current(self._device):
            base, size = self._map(place.handle)
            if place.offset_bytes + (rows - 1) * pitch + width > size:
                raise MappingError(f"{rows} rows of {width} bytes are outside {size} lent bytes")
            what = driver.CUDA_MEMCPY2D()
            what.srcMemoryType = what.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_UNIFIED
            what.srcDevice, what.srcPitch = base + place.offset_bytes, pitch
            what.dstDevice, what.dstPitch = out.data_ptr(), width
            what.WidthInBytes, what.Height = width, rows
            _call("cuMemcpy2DAsync", what, stream)

    def close(self) -> None:
        """Unmaps everything; copies must be done."""
        if self._mapped:
            with _current(self._device):
                for base in self._mapped.values():
                    with suppress(MappingError):
                        _call("cuIpcCloseMemHandle", base)
        self._mapped.clear()

    def _map(self, handle: bytes) -> tuple[int, int]:
        if handle not in self._mapped:
            driver = _driver()
            theirs = driver.CUipcMemHandle()
            try:
                theirs.reserved = handle
            except (TypeError, ValueError) as error:
                raise MappingError(f"a handle of {len(handle)} bytes") from error
            lazily = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            (base,) = _call("cuIpcOpenMemHandle", theirs, lazily.value)
            self._mapped[handle] = int(base)
        base = self._mapped[handle]
        _, size = _call("cuMemGetAddressRange", base)
        return base, int(size)


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Within it this thread's driver calls are about that GPU: they know nothing of what torch
    takes for the current one."""
    _call("cuCtxPushCurrent", _context(device))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent")


@cache
def _context(device: torch.device) -> Any:
    """The context of a GPU that torch uses too."""
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    (context,) = _call("cuDevicePrimaryCtxRetain", ordinal)
    return context


def _driver() -> Any:
    from cuda.bindings import driver  # noqa: PLC0415  # comes with torch's CUDA builds alone

    return driver


def _call(name: str, *arguments: Any) -> tuple[Any, ...]:
    driver = _driver()
    error, *values = getattr(driver, name)(*arguments)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise MappingError(f"{name}: {error.name}")
    return tuple(values)
