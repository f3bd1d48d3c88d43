"""Runs compiled loops on the OpenMP threads that torch's own matrix products use.

A second thread pool would compete with torch's for the same CPUs, because the threads of a pool
spin for a while after they finish (docs/LOG.md). So numba compiles each loop for one thread of a
team, and torch's threads are the team: the loops are started by libgomp's GOMP_parallel, the
function that an OpenMP compiler calls.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, ClassVar

import llvmlite.binding
import torch
from numba import cfunc, types
from torch import Tensor

team_rank = types.ExternalFunction("griffin_team_rank", types.int32())
team_size = types.ExternalFunction("griffin_team_size", types.int32())
team_barrier = types.ExternalFunction("griffin_team_barrier", types.void())


FAST = {"contract", "reassoc", "nsz"}
"""The fast-math flags of LLVM: it may reorder sums, which SIMD needs, but must respect infinities
and NaN."""


@cache
def _gomp() -> Any:
    """Returns the libgomp that torch has loaded, or None if torch uses other threads."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        return None
    # Under names of our own, since another OpenMP library in the process may define the same names.
    for name, function in (
        ("griffin_team_rank", library.omp_get_thread_num),
        ("griffin_team_size", library.omp_get_num_threads),
        ("griffin_team_barrier", library.GOMP_barrier),
    ):
        llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    library.GOMP_parallel.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    )
    library.GOMP_parallel.restype = None
    return library


@cache
def _stand_alone() -> None:
    """Defines a team of one, the calling thread, for use where torch's threads are not
    libgomp's."""
    for name, signature, body in (
        ("griffin_team_rank", types.int32(), lambda: 0),
        ("griffin_team_size", types.int32(), lambda: 1),
        ("griffin_team_barrier", types.void(), lambda: None),
    ):
        compiled = cfunc(signature)(body)
        _ALONE.append(compiled)
        llvmlite.binding.add_symbol(name, compiled.address)


_ALONE: list[Any] = []
"""Keeps the functions alive that the symbols point to."""


def runs_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether this package's loops run for weights of a dtype on a device."""
    return device.type == "cpu" and dtype is torch.bfloat16 and _gomp() is not None


class Kernel:
    """A loop that every thread of a team runs. It is compiled at its first use, or by
    ``compile_kernels``.

    Args:
        body: takes a pointer to int64 values, the arguments of ``__call__``; most are addresses.
    """

    known: ClassVar[list[Kernel]] = []

    def __init__(self, body: Callable[[Any], None]) -> None:
        self._body = body
        self.known.append(self)

    @cached_property
    def address(self) -> int:
        """Address of the compiled function."""
        if _gomp() is None:  # before compiling, which resolves the names above
            _stand_alone()
        # Not cached on disk: numba's cache would miss a change in a loop of another module.
        self._compiled = cfunc(types.void(types.CPointer(types.int64)), fastmath=FAST)(self._body)
        return int(self._compiled.address)

    @property
    def compiled(self) -> bool:
        """Whether the loop is compiled already, so that a call does not wait for that."""
        return "address" in self.__dict__

    def __call__(self, *arguments: int, threads: int | None = None) -> None:
        """Runs the loop on ``threads`` threads, or on as many as torch uses."""
        passed = (ctypes.c_int64 * len(arguments))(*arguments)
        if (library := _gomp()) is None:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)(passed)
        else:
            library.GOMP_parallel(self.address, passed, threads or torch.get_num_threads(), 0)


def compile_kernels() -> None:
    """Compiles all imported kernels, which takes a second or two, so that no request waits for
    it."""
    for kernel in Kernel.known:
        _ = kernel.address


def address(tensor: Tensor | None) -> int:
    """Returns the address of a tensor's first value; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
