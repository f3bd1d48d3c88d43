"""The transport through GPU memory: the importer maps the exporter's memory by CUDA IPC and copies.

This calls the driver's functions directly. torch.multiprocessing keeps an exported tensor until the
importer has released it, which an importer that was killed never does. Here the exporter decides,
and the importer must have copied what it needs while the call is open.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from griffin.v1 import prefill_pb2 as pb
from griffin_core.forward.events import (
    LayerKv,
)
from griffin_server.transfer.base import Bytes, MemoryNotShared, copy_stream, wait_for_kv
from griffin_server.transfer.shape import HandoffShape

PROOF_BYTES = 16

INTEGER_TYPES = {2: torch.int16, 4: torch.int32}
"""The integer type of a value's size in bytes, for the digest of KV."""


class IpcError(ValueError):
    """Memory cannot be exported or imported."""


@cache
def boot_id() -> str:
    """The id of the kernel's current boot, which all containers of a host share; "" if unknown."""
    with suppress(OSError):
        path = Path("/proc/sys/kernel/random/boot_id")
        return path.read_text(encoding="ascii").strip()
    return ""


def can_share(device: torch.device) -> bool:
    """Whether this process can try to export and import this device's memory. Whether it works is
    known only once an importer has verified the proof. The driver's Python bindings come with
    torch's CUDA builds."""
    if device.type != "cuda" or not boot_id() or importlib.util.find_spec("cuda") is None:
        return False
    return importlib.util.find_spec("cuda.bindings") is not None


def location_of(x: Tensor) -> pb.CudaPlace:
    """The location of a tensor's rows. A row is its last two dimensions, which are contiguous; the
    dimensions before them count rows of one pitch.

    Raises:
        IpcError: the allocation cannot be exported (one of an expandable segment cannot).
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
    """Random bytes, and a tensor that holds them on the device as long as this process runs. A
    process that reads them at the tensor's location sees this process's memory."""
    proof = secrets.token_bytes(PROOF_BYTES)
    stored = torch.frombuffer(bytearray(proof), dtype=torch.uint8).to(device)
    torch.cuda.synchronize(device)
    return proof, stored


class Exports:
    """The tensors exported for one call. They stay allocated while this object lives.

    Raises:
        IpcError: this device's memory cannot be exported.
    """

    def __init__(self, device: torch.device) -> None:
        self.proof, stored = _proof(device)
        """The bytes stored at ``proof_location``."""
        self.proof_location = location_of(stored)
        self._tensors: list[Tensor] = []

    def export(self, x: Tensor) -> pb.CudaPlace:
        """Exports a tensor and returns its location."""
        self._tensors.append(x)
        return location_of(x)


class Imports:
    """Other processes' memory, of this or another GPU, mapped into a GPU's addresses until
    ``close``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mapped: dict[bytes, int] = {}

    def copy(self, location: pb.CudaPlace, out: Tensor, *, rows: int) -> None:
        """Fills a contiguous tensor on the GPU with rows of imported memory, on the current stream.

        Raises:
            IpcError: the memory cannot be mapped, or the rows are not all inside it.
        """
        driver = _driver()
        stream = torch.cuda.current_stream(self._device).cuda_stream
        width = out.nbytes // rows
        pitch = max(width, location.pitch_bytes)  # rows must not overlap
        with _current(self._device):
            base, size = self._map(location.handle)
            if location.offset_bytes + (rows - 1) * pitch + width > size:
                raise IpcError(f"{rows} rows of {width} bytes are outside {size} exported bytes")
            copy = driver.CUDA_MEMCPY2D()
            copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_UNIFIED
            copy.srcDevice, copy.srcPitch = base + location.offset_bytes, pitch
            copy.dstDevice, copy.dstPitch = out.data_ptr(), width
            copy.WidthInBytes, copy.Height = width, rows
            _call("cuMemcpy2DAsync", copy, stream)

    def close(self) -> None:
        """Unmaps all imported memory. Copies from it must have finished."""
        if self._mapped:
            with _current(self._device):
                for base in self._mapped.values():
                    with suppress(IpcError):
                        _call("cuIpcCloseMemHandle", base)
        self._mapped.clear()

    def _map(self, handle: bytes) -> tuple[int, int]:
        if handle not in self._mapped:
            driver = _driver()
            theirs = driver.CUipcMemHandle()
            try:
                theirs.reserved = handle
            except (TypeError, ValueError) as error:
                raise IpcError(f"a handle of {len(handle)} bytes") from error
            lazily = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            (base,) = _call("cuIpcOpenMemHandle", theirs, lazily.value)
            self._mapped[handle] = int(base)
        base = self._mapped[handle]
        _, size = _call("cuMemGetAddressRange", base)
        return base, int(size)


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Makes a GPU current for this thread's driver calls, which ignore torch's current device."""
    _call("cuCtxPushCurrent", _context(device))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent")


@cache
def _context(device: torch.device) -> Any:
    """A GPU's primary context, which torch uses too."""
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    (context,) = _call("cuDevicePrimaryCtxRetain", ordinal)
    return context


def _driver() -> Any:
    from cuda.bindings import driver  # noqa: PLC0415  # comes only with torch's CUDA builds

    return driver


def _call(name: str, *arguments: Any) -> tuple[Any, ...]:
    driver = _driver()
    error, *values = getattr(driver, name)(*arguments)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise IpcError(f"{name}: {error.name}")
    return tuple(values)


class CudaIpcExporter:
    """Prefill's end: exports KV where the model wrote it."""

    transport: ClassVar = pb.TRANSPORT_CUDA_MEMORY
    exports_memory: ClassVar[bool] = True

    def __init__(self, shape: HandoffShape, device: torch.device, exports: Exports) -> None:
        self._exports = exports
        self._integers = INTEGER_TYPES[shape.dtype.itemsize]
        self.stream = copy_stream(device)

    def write_proof(self, header: pb.PrefillHeader) -> None:
        header.proof = self._exports.proof
        header.proof_place.CopyFrom(self._exports.proof_location)

    def chunks(self, event: LayerKv) -> Iterator[tuple[pb.KvChunk, Bytes]]:
        with torch.cuda.stream(self.stream):
            wait_for_kv(event)
            digest = _digest(event.kv, self._integers)
        yield (
            pb.KvChunk(
                layer=event.layer,
                first_token=event.first_token,
                tokens=event.kv.shape[2],
                place=self._exports.export(event.kv),
            ),
            digest,
        )


class CudaIpcImporter:
    """Decode's end: copies KV from the exporter's GPU memory to its own."""

    transport: ClassVar = pb.TRANSPORT_CUDA_MEMORY

    def __init__(self, shape: HandoffShape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._integers = INTEGER_TYPES[shape.dtype.itemsize]
        self._stream = copy_stream(device)
        self._imports = Imports(device)

    def offer(self, request: pb.PrefillRequest) -> None:
        request.cuda_memory.boot_id = boot_id()

    def verify(self, header: pb.PrefillHeader) -> None:
        with torch.cuda.stream(self._stream):
            found = torch.zeros(PROOF_BYTES, dtype=torch.uint8, device=self._device)
            self._copy(header.proof_place, found, rows=1)
            verified = bytes(found.tolist()) == header.proof
        if not verified:
            raise MemoryNotShared("the exported memory does not hold the proof in the header")

    def read(self, chunk: pb.KvChunk) -> tuple[LayerKv, Bytes]:
        heads, head_dim = self._shape.kv_heads, self._shape.head_dim
        with torch.cuda.stream(self._stream):
            kv = torch.empty(
                (2, heads, chunk.tokens, head_dim), dtype=self._shape.dtype, device=self._device
            )
            self._copy(chunk.place, kv, rows=2 * heads)
            digest = _digest(kv, self._integers)
            ready = torch.cuda.current_stream().record_event()
        event = LayerKv(layer=chunk.layer, first_token=chunk.first_token, kv=kv, ready=ready)
        return event, digest

    def _copy(self, location: pb.CudaPlace, out: Tensor, *, rows: int) -> None:
        try:
            self._imports.copy(location, out, rows=rows)
        except IpcError as error:
            raise MemoryNotShared(str(error)) from error

    def close(self, *, complete: bool) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._imports.close()


def _digest(kv: Tensor, integers: torch.dtype) -> bytes:
    """The sum of KV's values read as integers, 8 bytes. Waits for the current stream."""
    return int(kv.view(integers).sum(dtype=torch.int64)).to_bytes(8, "little", signed=True)
