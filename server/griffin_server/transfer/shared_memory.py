"""The transport through memory that two processes of one host share.

The decode server creates a segment and owns it; the prefill server maps it during one call. Both
verify that they see the same bytes before they use it: the prefill server compares the nonce, and
the decode server reads the nonce that the prefill server wrote in its place. A segment that is
missing or too small is no error: the KV goes in messages then.

The segments are files in /dev/shm and not multiprocessing.shared_memory, because before Python 3.13
its resource tracker removes a segment when a process that only attached to it ends.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from griffin.v1 import prefill_pb2 as pb
from griffin_core.forward.events import (
    LayerKv,
)
from griffin_server.transfer.base import Bytes, HostExporter, HostImporter
from griffin_server.transfer.shape import HandoffShape

DIRECTORY = Path("/dev/shm")
NONCE_BYTES = 16
DATA_START = 64  # after the nonce, on a cache line of its own
_NAME = re.compile(r"griffin-\d+-[0-9a-f]{32}")


class Segment:
    """A mapped segment.

    Args:
        name: the name of its file in ``DIRECTORY``.
        mapping: the mapped file.
    """

    def __init__(self, name: str, mapping: mmap.mmap) -> None:
        self.name = name
        self._mapping = mapping

    @property
    def size_bytes(self) -> int:
        return len(self._mapping)

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

    def unlink(self) -> None:
        """Removes the file; the kernel frees the memory with its last mapping."""
        (DIRECTORY / self.name).unlink(missing_ok=True)


def create_segment(size_bytes: int) -> Segment | None:
    """Creates a segment; None if /dev/shm does not exist or has no room for it.

    All of its memory is allocated here, because a write to a page that /dev/shm cannot back kills
    the process.
    """
    name = f"griffin-{os.getpid()}-{secrets.token_hex(16)}"
    try:
        descriptor = os.open(DIRECTORY / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        # The lock lasts as long as the mapping, which keeps a duplicate of the descriptor. It tells
        # whether the owner is alive. A process id would not, since containers reuse the same ids.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(descriptor).st_nlink:  # another process took it for a stale one
            return None
        os.posix_fallocate(descriptor, 0, size_bytes)
        return Segment(name, mmap.mmap(descriptor, size_bytes))
    except OSError:
        (DIRECTORY / name).unlink(missing_ok=True)
        return None
    finally:
        os.close(descriptor)


def attach_segment(name: str, size_bytes: int, nonce: bytes) -> Segment | None:
    """Maps a segment that another process offers; None unless it exists, belongs to this user and
    starts with ``nonce``."""
    if not _NAME.fullmatch(name):  # also refuses paths
        return None
    try:
        descriptor = os.open(DIRECTORY / name, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not mine or found.st_size < max(size_bytes, DATA_START):
            return None
        os.posix_fallocate(descriptor, 0, size_bytes)  # a write to a hole may kill
        segment = Segment(name, mmap.mmap(descriptor, size_bytes))
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)
    return segment if segment.read_nonce() == nonce else None


class SegmentPool:
    """Segments kept for reuse, because the first write to a page takes eight times as long as a
    later one (docs/LOG.md). At most ``KEEP`` stay idle. The methods are thread-safe."""

    KEEP = 2

    def __init__(self) -> None:
        self._free: list[Segment] = []
        self._closed = False
        self._lock = threading.Lock()

    def acquire(self, size_bytes: int) -> Segment | None:
        """A segment of at least that size; None if none can be created."""
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
                self._free.pop(0).unlink()

    def close(self) -> None:
        """Removes all idle segments, and from now on each one that is released."""
        with self._lock:
            self._closed = True
            while self._free:
                self._free.pop().unlink()


def remove_stale_segments() -> None:
    """Removes the segments of this host's Griffin processes that died without removing them."""
    for path in DIRECTORY.glob("griffin-*"):
        if _NAME.fullmatch(path.name):
            with suppress(OSError):  # the owner is alive, another user, or has just removed it
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(descriptor)


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
    """

    transport: ClassVar = pb.TRANSPORT_SHARED_MEMORY

    def __init__(
        self, shape: HandoffShape, device: torch.device, segment: Segment, pool: SegmentPool
    ) -> None:
        super().__init__(shape, device)
        self._segment = segment
        self._pool = pool
        self._nonce = segment.write_nonce()

    def offer(self, request: pb.PrefillRequest) -> None:
        request.shared_memory.name = self._segment.name
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
        if complete:
            self._pool.release(self._segment)
        else:  # the exporter may still be writing
            self._segment.unlink()
