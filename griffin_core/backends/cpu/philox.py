"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011): 128 random bits are a pure function of a 64-bit key and a 128-bit counter."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROUNDS = 10

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def philox(typing_context: Any, c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Returns four random uint32 for a counter and a key, given as uint32. It is written as LLVM
    code, since numba takes half a second to compile the rounds, and without a loop, so that LLVM
    can vectorize a loop around it."""
    signature = types.UniTuple(types.uint32, 4)(*[types.uint32] * 6)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def product(factor: int, value: Any) -> tuple[Any, Any]:
            whole = builder.mul(ir.Constant(_I64, factor), builder.zext(value, _I64))
            upper = builder.lshr(whole, ir.Constant(_I64, 32))
            return builder.trunc(upper, _I32), builder.trunc(whole, _I32)

        c0, c1, c2, c3, k0, k1 = arguments
        for i in range(ROUNDS):
            own0 = builder.add(k0, ir.Constant(_I32, _W0 * i & 0xFFFFFFFF))
            own1 = builder.add(k1, ir.Constant(_I32, _W1 * i & 0xFFFFFFFF))
            high0, low0 = product(_M0, c0)
            high1, low1 = product(_M1, c2)
            c0, c1 = builder.xor(builder.xor(high1, c1), own0), low1
            c2, c3 = builder.xor(builder.xor(high0, c3), own1), low0
        return cgutils.pack_array(builder, [c0, c1, c2, c3])

    return signature, build
