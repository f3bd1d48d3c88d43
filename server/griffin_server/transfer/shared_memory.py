"""The transport through memory that two processes of one host share.

The decode server makes a segment, memory without a name, and owns it. The prefill server gets its
descriptor over a Unix socket and maps it during one call. Both verify that they see the same bytes
before they use it: the prefill server compares the nonce, and the decode server reads the nonce
that the prefill server wrote in its place. A segment that cannot be had is no error: the KV goes in
messages then. The kernel frees it when both have let it go, also if they are killed.

Segments are sealed, so that neither end can shrink one under the other: touching memory that is no
longer there would end a process by SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from griffin.v1 import prefill_pb2 as pb
from griffin_core.engine.device_memory import available_bytes
from griffin_core.forward.events import (
    LayerKv,
)
from griffin_server.transfer.base import Bytes, HostExporter, HostImporter
from griffin_server.transfer.descriptors import NONCE_BYTES, DescriptorSocket, fetch
from griffin_server.transfer.shape import HandoffShape

DATA_START = 64  # after the nonce, on a cache line of its own

MOST_OF_AVAILABLE = 0.5
"""The most of the memory that is available that a new segment takes."""


class Segment:
    """A mapped segment.

    Args:
        descriptor: of its memory; the segment closes it.
        size_bytes: how much of the memory to map.

    Raises:
        OSError, ValueError: it cannot be mapped.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.descriptor = descriptor
        self.size_bytes = size_bytes
        try:
            self._mapping = mmap.mmap(descriptor, size_bytes)
        except BaseException:
            os.close(descriptor)
            raise

    def write_nonce(self) -> bytes:
        """Writes new random bytes at the start and returns them."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._mapping[:NONCE_BYTES] = nonce
        return nonce

    def read_nonce(self) -> bytes:
        return self._mapping[:NONCE_BYTES]

    def write(self, offset: int, tensor: Tensor) -> memoryview:
        """Copies a contiguous CPU tensor's bytes to ``offset`` and returns a view of the copy.

        Raises:
            ValueError: the bytes do not fit into the segment.
        """
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        end = offset + data.nbytes
        if offset < DATA_START or end > self.size_bytes:
            raise ValueError(f"bytes {offset}..{end} are outside a segment of {self.size_bytes}")
        view = np.frombuffer(self._mapping, dtype=np.uint8)[offset:end]
        view[:] = data
        return view.data

    def read(self, offset: int, size: int) -> bytearray:
        """A copy of ``size`` bytes at ``offset``.

        Raises:
            ValueError: they are not all inside the segment.
        """
        end = offset + size
        if offset < DATA_START or end > self.size_bytes:
            raise ValueError(f"bytes {offset}..{end} are outside a segment of {self.size_bytes}")
        return bytearray(memoryview(self._mapping)[offset:end])

    def close(self) -> None:
        """Lets the memory go, once nothing refers to what ``write`` returned."""
        if hasattr(self, "_mapping"):
            del self._mapping
            os.close(self.descriptor)

    def __del__(self) -> None:
        self.close()


def create_segment(size_bytes: int) -> Segment | None:
    """Makes a segment; None if this system has none or too little memory is available.

    All of its memory is allocated here, so that a lack of it shows here and nowhere later.
    """
    if not hasattr(os, "memfd_create") or size_bytes > MOST_OF_AVAILABLE * available_bytes():
        return None
    try:
        descriptor = os.memfd_create("griffin-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(descriptor)
        return None
    try:
        return Segment(descriptor, size_bytes)
    except OSError:
        return None


def attach_segment(directory: Path, offer: pb.SharedMemoryOffer) -> Segment | None:
    """Maps a segment that another process offers; None unless it can be had, cannot be shrunk and
    starts with the offer's nonce. It may wait for the other process for some seconds.

    Args:
        directory: of the sockets over which descriptors come.
    """
    descriptor = fetch(directory, offer.socket, offer.nonce)
    if descriptor is None:
        return None
    try:
        found = os.fstat(descriptor)
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        fits = max(offer.size_bytes, DATA_START) <= found.st_size
        if not (stat.S_ISREG(found.st_mode) and sealed and fits):
            raise ValueError("no segment")
        os.posix_fallocate(descriptor, 0, offer.size_bytes)  # a write to a hole may find no memory
    except (OSError, ValueError):  # without seals, as of a file, they cannot be asked for
        os.close(descriptor)
        return None
    try:
        segment = Segment(descriptor, offer.size_bytes)
    except (OSError, ValueError):
        return None
    return segment if segment.read_nonce() == offer.nonce else None


class SegmentPool:
    """Segments kept for reuse, because the first write to a page takes eight times as long as a
    later one (docs/LOG.md). At most ``KEEP`` stay idle. The methods are thread-safe."""

    KEEP = 2

    def __init__(self) -> None:
        self._free: list[Segment] = []
        self._closed = False
        self._lock = threading.Lock()

    def acquire(self, size_bytes: int) -> Segment | None:
        """A segment of at least that size; None if none can be made."""
        with self._lock:
            for segment in self._free:
                if segment.size_bytes >= size_bytes:
                    self._free.remove(segment)
                    return segment
        return create_segment(1 << (size_bytes - 1).bit_length())

    def release(self, segment: Segment) -> None:
        """Returns a segment to the pool. No other process may still write to it."""
        with self._lock:
            self._free.append(segment)
            self._free.sort(key=lambda s: s.size_bytes)
            while len(self._free) > (0 if self._closed else self.KEEP):
                self._free.pop(0).close()

    def close(self) -> None:
        """Lets all idle segments go, and from now on each one that is released."""
        with self._lock:
            self._closed = True
            while self._free:
                self._free.pop().close()


class SharedMemoryExporter(HostExporter):
    """Prefill's end: writes KV into the decode server's segment."""

    transport: ClassVar = pb.TRANSPORT_SHARED_MEMORY

    def __init__(self, shape: HandoffShape, segment: Segment, device: torch.device) -> None:
        super().__init__(shape, device)
        self._segment = segment
        self._offset = DATA_START

    def write_proof(self, header: pb.PrefillHeader) -> None:
        header.proof = self._segment.write_nonce()

    def chunks(self, event: LayerKv) -> Iterator[tuple[pb.KvChunk, Bytes]]:
        for chunk, block in self._blocks(event):
            chunk.segment_offset_bytes = self._offset
            written = self._segment.write(self._offset, block)
            self._offset += len(written)
            yield chunk, written


class SharedMemoryImporter(HostImporter):
    """Decode's end: owns the segment and reads KV from it.

    Args:
        segment: acquired from ``pool``, to which ``close`` releases it.
        descriptors: gives the segment's descriptor to the exporter.
    """

    transport: ClassVar = pb.TRANSPORT_SHARED_MEMORY

    def __init__(
        self,
        shape: HandoffShape,
        device: torch.device,
        segment: Segment,
        pool: SegmentPool,
        descriptors: DescriptorSocket,
    ) -> None:
        super().__init__(shape, device)
        self._segment = segment
        self._pool = pool
        self._descriptors = descriptors
        self._nonce = segment.write_nonce()
        descriptors.offer(self._nonce, segment.descriptor)

    def offer(self, request: pb.PrefillRequest) -> None:
        request.shared_memory.socket = self._descriptors.name
        request.shared_memory.size_bytes = self._segment.size_bytes
        request.shared_memory.nonce = self._nonce

    def verify(self, header: pb.PrefillHeader) -> None:
        if header.proof == self._nonce or header.proof != self._segment.read_nonce():
            raise ValueError("the shared-memory segment is not proved")

    def read(self, chunk: pb.KvChunk) -> tuple[LayerKv, Bytes]:
        size = chunk.tokens * self._shape.token_bytes
        data = self._segment.read(chunk.segment_offset_bytes, size)
        return self._event(chunk, data), data

    def close(self, *, complete: bool) -> None:
        self._descriptors.withdraw(self._nonce)
        if complete:
            self._pool.release(self._segment)
        else:  # the exporter may still be writing
            self._segment.close()
