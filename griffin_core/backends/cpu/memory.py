"""Memory that the system allocates page by page on first write, and takes back when it is freed."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0)


class LazyTensors:
    """Tensors whose pages are allocated when they are first written.

    Args:
        count: number of tensors.
        shape: the shape of each tensor, four dimensions; ``trim`` frees ranges of the third.
    """

    def __init__(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._shape = shape
        self._row_bytes = shape[3] * dtype.itemsize
        size = prod(shape) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._maps = [mmap.mmap(-1, size, flags=flags) for _ in range(count)]
        self.tensors = [torch.frombuffer(each, dtype=dtype).view(*shape) for each in self._maps]

    def trim(self, first: int, end: int) -> None:
        """Returns the whole pages between two indices of the third dimension to the system."""
        for outer in range(self._shape[0] * self._shape[1]):
            begin = (outer * self._shape[2] + first) * self._row_bytes
            stop = (outer * self._shape[2] + end) * self._row_bytes
            begin, stop = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE
            length = stop * mmap.PAGESIZE - begin
            if length > 0:
                for each in self._maps:
                    each.madvise(mmap.MADV_DONTNEED, begin, length)
