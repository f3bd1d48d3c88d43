"""Running compiled loops on the threads that torch's own products run on.

A second pool of threads would fight with torch's for the same CPUs: whichever has just worked spins
for a while, waiting for more (docs/LOG.md). So numba compiles the loops, each for one thread of a
team, and the team is torch's: libgomp's GOMP_parallel, which is what an OpenMP compiler calls.
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
"""What LLVM may do with floats: sum in another order, which vectors need, but believe in infinities
and NaN."""


@cache
def _gomp() -> Any:
    """The libgomp that torch has loaded; None if its threads are other ones."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        return None
    # By names of our own: another OpenMP in the process has functions of the same names.
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
    """Where torch's threads are not libgomp's: a team of one, the calling thread."""
    for name, signature, body in (
        ("griffin_team_rank", types.int32(), lambda: 0),
        ("griffin_team_size", types.int32(), lambda: 1),
        ("griffin_team_barrier", types.void(), lambda: None),
    ):
        compiled = cfunc(signature)(body)
        _ALONE.append(compiled)
        llvmlite.binding.add_symbol(name, compiled.address)


_ALONE: list[Any] = []
"""Keeps the code that the symbols name."""


def runs_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this kind are multiplied by the loops of this package."""
    return device.type == "cpu" and dtype is torch.bfloat16 and _gomp() is not None


class Kernel:
    """A loop for each thread of a team. Compiled at its first use, or by ``compile_kernels``.

    Args:
        body: takes one pointer to int64s, the arguments of ``__call__``; addresses, mostly.
    """

    known: ClassVar[list[Kernel]] = []

    def __init__(self, body: Callable[[Any], None]) -> None:
        self._body = body
        self.known.append(self)

    @cached_property
    def address(self) -> int:
        """Address of the compiled function."""
        if _gomp() is None:  # before it is compiled: the names above are resolved then
            _stand_alone()
        # Not cached on disk: numba's cache would miss a change in a loop of another module.
        self._compiled = cfunc(types.void(types.CPointer(types.int64)), fastmath=FAST)(self._body)
        return int(self._compiled.address)

    @property
    def compiled(self) -> bool:
        """Whether it is, so that a call does not wait for it."""
        return "address" in self.__dict__

    def __call__(self, *arguments: int, threads: int | None = None) -> None:
        """Runs it on as many threads as torch uses, or on ``threads``."""
        passed = (ctypes.c_int64 * len(arguments))(*arguments)
        if (library := _gomp()) is None:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)(passed)
        else:
            library.GOMP_parallel(self.address, passed, threads or torch.get_num_threads(), 0)


def compile_kernels() -> None:
    """Compiles all that are imported, a second or two, so that no request waits for it."""
    for kernel in Kernel.known:
        _ = kernel.address


def address(tensor: Tensor | None) -> int:
    """Where its first value lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
