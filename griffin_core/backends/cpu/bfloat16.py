"""Two things that numba lacks: bfloat16, kept as the upper half of a float32, and access to memory
by address."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_I32, _F32 = ir.IntType(32), ir.FloatType()


@intrinsic
def at(typing_context: Any, address: Any, of: Any) -> Any:
    """Makes a pointer from an address: ``at(address, types.uint16)`` is indexed without bounds
    checks."""
    signature = types.CPointer(of.dtype)(address, of)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, build


@intrinsic
def widen(typing_context: Any, bits: Any) -> Any:
    """Converts bfloat16 bits (uint16) to float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        upper = builder.shl(builder.zext(arguments[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(upper, _F32)

    return types.float32(types.uint16), build


@intrinsic
def float_of(typing_context: Any, bits: Any) -> Any:
    """Reinterprets int32 bits as float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), build


@intrinsic
def bits_of(typing_context: Any, value: Any) -> Any:
    """Returns the bits of a float32 as uint32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), build


@njit(inline="always")
def narrow(value: Any) -> Any:
    """Converts a float32 to bfloat16 bits, rounded to nearest even; NaN stays NaN."""
    bits = bits_of(value)
    rounded = bits + types.uint32(0x7FFF) + ((bits >> types.uint32(16)) & types.uint32(1))
    if value != value:  # NaN: rounding could carry it to infinity
        rounded = bits | types.uint32(0x400000)
    return types.uint16(rounded >> types.uint32(16))
