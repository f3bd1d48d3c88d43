"""KV through memory that two processes of one host share.

Decode makes a segment and owns it; Prefill maps it for the length of one call. Both prove that they
see the same bytes before any is used: Prefill reads the nonce, Decode reads what Prefill wrote over
it. A segment that does not fit, or is not there, is no error: the KV goes by chunks then.

The files lie in /dev/shm rather than behind multiprocessing.shared_memory, whose resource tracker
removes a segment when the process that merely attached to it ends (before Python 3.13).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import stat
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIRECTORY = Path("/dev/shm")
NONCE_BYTES = 16
DATA_START = 64  # behind the nonce, on a cache line
_NAME = re.compile(r"griffin-\d+-[0-9a-f]{32}")


class Segment:
    """A mapped segment.

    Args:
        name: its file's name.
        mapping: the whole of it.
    """

    def __init__(self, name: str, mapping: mmap.mmap) -> None:
        self.name = name
        self._mapping = mapping

    @property
    def size_bytes(self) -> int:
        return len(self._mapping)

    def write_nonce(self) -> bytes:
        """Puts fresh random bytes at the start and returns them."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._mapping[:NONCE_BYTES] = nonce
        return nonce

    def read_nonce(self) -> bytes:
        return self._mapping[:NONCE_BYTES]

    def write(self, offset: int, tensor: Tensor) -> memoryview:
        """Copies a contiguous CPU tensor's bytes to ``offset`` and returns them as they lie there.

        Raises:
            ValueError: it does not fit.
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
            ValueError: that is outside the segment.
        """
        end = offset + size
        if offset < DATA_START or end > self.size_bytes:
            raise ValueError(f"bytes {offset}..{end} are outside a segment of {self.size_bytes}")
        return bytearray(memoryview(self._mapping)[offset:end])

    def unlink(self) -> None:
        """Removes the file; the memory goes with the last mapping."""
        (DIRECTORY / self.name).unlink(missing_ok=True)


def create_segment(size_bytes: int) -> Segment | None:
    """A new segment, its memory taken at once; None if there is no room or no such file system.

    Taken at once because a write to a page that /dev/shm cannot back kills the process.
    """
    name = f"griffin-{os.getpid()}-{secrets.token_hex(16)}"
    try:
        descriptor = os.open(DIRECTORY / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        # Held as long as the mapping, which keeps a duplicate of the descriptor. A process id would
        # not tell whether the owner lives: each container may have the same one.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(descriptor).st_nlink:  # taken for a stale one just before
            return None
        os.posix_fallocate(descriptor, 0, size_bytes)
        return Segment(name, mmap.mmap(descriptor, size_bytes))
    except OSError:
        (DIRECTORY / name).unlink(missing_ok=True)
        return None
    finally:
        os.close(descriptor)


def attach_segment(name: str, size_bytes: int, nonce: bytes) -> Segment | None:
    """Maps a segment somebody offers; None unless it is there, belongs to this user and starts with
    ``nonce``."""
    if not _NAME.fullmatch(name):  # also keeps paths out
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
        os.posix_fallocate(descriptor, 0, size_bytes)  # a hole that cannot be filled kills
        segment = Segment(name, mmap.mmap(descriptor, size_bytes))
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)
    return segment if segment.read_nonce() == nonce else None


class SegmentPool:
    """Segments kept for reuse: the first touch of a page costs eight times a later one
    (docs/LOG.md). At most KEEP lie idle. Any thread may call it."""

    KEEP = 2

    def __init__(self) -> None:
        self._free: list[Segment] = []
        self._closed = False
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> Segment | None:
        """A segment of at least that size, or None."""
        with self._lock:
            for segment in self._free:
                if segment.size_bytes >= size_bytes:
                    self._free.remove(segment)
                    return segment
        return create_segment(1 << (size_bytes - 1).bit_length())

    def give_back(self, segment: Segment) -> None:
        """Takes a segment back that nobody else writes to any more."""
        with self._lock:
            self._free.append(segment)
            self._free.sort(key=lambda s: s.size_bytes)
            while len(self._free) > (0 if self._closed else self.KEEP):
                self._free.pop(0).unlink()

    def close(self) -> None:
        """Removes all idle segments, and whatever still comes back."""
        with self._lock:
            self._closed = True
            while self._free:
                self._free.pop().unlink()


def remove_stale_segments() -> None:
    """Removes segments of Griffin processes of this host that are gone without having done so."""
    for path in DIRECTORY.glob("griffin-*"):
        if _NAME.fullmatch(path.name):
            with suppress(OSError):  # its owner lives, it is another user's, or just gone
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(descriptor)
