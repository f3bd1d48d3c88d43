"""The two inner loops of attention, written as LLVM vectors.

If they are plain loops, LLVM sums the lanes of every dot product separately, which takes as long as
multiplying, and keeps sums in memory though registers have room for them. Here 64 bytes of bfloat16
are widened to two float32 vectors, one of the 16 even and one of the 16 odd elements. ``place``
gives the resulting position of an element; queries and sums are kept in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
BLOCK_WIDTH = 2 * LANES
"""The size of a head must be a multiple of this."""

KEYS = 16
"""The number of keys whose dot products are reduced together."""

REGISTERS = 16
"""The number of sums kept in registers at once; AVX-512 has 32 registers in all."""

_FLAGS = ("contract", "reassoc", "nsz")
_I32 = ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_I32, LANES)


@njit(inline="always")
def place(i: Any) -> Any:
    """Returns the position of element i of a head after widening."""
    return i - i % BLOCK_WIDTH + i % 2 * LANES + i % BLOCK_WIDTH // 2


def score_loop(size: int, group: int, stride: int) -> Any:
    """Makes a function of (keys, q, count, scores): scores[g, j] = key_j · q_g for ``count`` keys.

    Args:
        size: number of elements of a head, a multiple of ``BLOCK_WIDTH``.
        group: number of query heads per key head.
        stride: number of scores between one query head's and the next one's.
    """

    def dots(builder: Any, keys: Any, q: Any, scores: Any, count: int) -> None:
        columns: list[list[Any]] = [[] for _ in range(group)]
        for key in range(count):
            elements = _widened(builder, keys, 2 * size * key, size)
            for head in range(group):
                total = None
                for chunk, element in enumerate(elements):
                    weight = _load(builder, q, 4 * (head * size + chunk * LANES), _FLOATS)
                    total = _fma(builder, element, weight, total)
                columns[head].append(total)
                # Two sums are merged as soon as both exist, so that few are live.
                merged = key + 1
                while merged % 2 == 0:
                    right, left = columns[head].pop(), columns[head].pop()
                    columns[head].append(_pairs(builder, left, right))
                    merged //= 2
        for head in range(group):
            target = _pointer(builder, scores, 4 * head * stride, _FLOATS)
            if count == KEYS:
                builder.store(columns[head][0], target, align=4)
            else:
                one = builder.bitcast(target, ir.FloatType().as_pointer())
                builder.store(_sum(builder, columns[head][0]), one)

    @intrinsic
    def score_all(typing_context: Any, keys: Any, q: Any, scores: Any) -> Any:
        return _emitted(3, partial(dots, count=KEYS))

    @intrinsic
    def score_one(typing_context: Any, keys: Any, q: Any, scores: Any) -> Any:
        return _emitted(3, partial(dots, count=1))

    @njit
    def score(keys, q, count, scores):
        whole = count - count % KEYS
        for j in range(0, whole, KEYS):
            score_all(keys + 2 * size * j, q, scores + 4 * j)
        for j in range(whole, count):
            score_one(keys + 2 * size * j, q, scores + 4 * j)

    return score


def gather_loop(size: int, group: int, stride: int) -> Any:
    """Makes a function of (totals, values, count, scores): totals[g] += Σ_j scores[g, j] · value_j
    for ``count`` values.

    Args:
        size, group, stride: as for ``score_loop``.
    """
    vectors = size // LANES
    at_once = max(1, REGISTERS // vectors)

    def emit(builder: Any, totals: Any, values: Any, count: Any, scores: Any) -> None:
        for first in range(0, group, at_once):
            heads = range(first, min(group, first + at_once))
            sums = {}
            for head in heads:
                for chunk in range(vectors):
                    held = cgutils.alloca_once(builder, _FLOATS)
                    at = 4 * (head * size + chunk * LANES)
                    builder.store(_load(builder, totals, at, _FLOATS), held)
                    sums[head, chunk] = held
            with cgutils.for_range(builder, count) as loop:
                row = builder.add(values, builder.mul(loop.index, loop.index.type(2 * size)))
                own = builder.add(scores, builder.mul(loop.index, loop.index.type(4)))
                elements = _widened(builder, row, 0, size)
                for head in heads:
                    weight = _spread(
                        builder, _load(builder, own, 4 * head * stride, ir.FloatType())
                    )
                    for chunk, element in enumerate(elements):
                        held = sums[head, chunk]
                        builder.store(_fma(builder, element, weight, builder.load(held)), held)
            for (head, chunk), held in sums.items():
                target = _pointer(builder, totals, 4 * (head * size + chunk * LANES), _FLOATS)
                builder.store(builder.load(held), target, align=4)

    @intrinsic
    def gather_all(typing_context: Any, totals: Any, values: Any, count: Any, scores: Any) -> Any:
        return _emitted(4, emit)

    @njit
    def gather(totals, values, count, scores):
        gather_all(totals, values, count, scores)

    return gather


def _emitted(integers: int, emit: Callable[..., None]) -> Any:
    """Returns the signature and the code generator of an intrinsic that takes that many int64
    values."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * integers), build


def _pointer(builder: Any, base: Any, offset: int, kind: Any) -> Any:
    return builder.inttoptr(builder.add(base, base.type(offset)), kind.as_pointer())


def _load(builder: Any, base: Any, offset: int, kind: Any) -> Any:
    return builder.load(_pointer(builder, base, offset, kind), align=4)


def _widened(builder: Any, base: Any, offset: int, size: int) -> list[Any]:
    """Loads ``size`` bfloat16 values from an address and widens them to float32 vectors."""
    vectors = []
    for start in range(0, size, BLOCK_WIDTH):
        pairs = builder.load(_pointer(builder, base, offset + 2 * start, _INTS), align=2)
        even = builder.shl(pairs, ir.Constant(_INTS, [16] * LANES))
        odd = builder.and_(pairs, ir.Constant(_INTS, [-65536] * LANES))
        vectors += [builder.bitcast(even, _FLOATS), builder.bitcast(odd, _FLOATS)]
    return vectors


def _fma(builder: Any, a: Any, b: Any, c: Any | None) -> Any:
    product = builder.fmul(a, b, flags=_FLAGS)
    return product if c is None else builder.fadd(product, c, flags=_FLAGS)


def _spread(builder: Any, value: Any) -> Any:
    empty = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(empty, value, _I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(_INTS, [0] * LANES))


def _pairs(builder: Any, left: Any, right: Any) -> Any:
    """Returns the sums of neighbouring lanes: those of ``left``, then those of ``right``."""
    even = ir.Constant(_INTS, list(range(0, 2 * LANES, 2)))
    odd = ir.Constant(_INTS, list(range(1, 2 * LANES, 2)))
    return builder.fadd(
        builder.shuffle_vector(left, right, even),
        builder.shuffle_vector(left, right, odd),
        flags=_FLAGS,
    )


def _sum(builder: Any, vector: Any) -> Any:
    for half in (8, 4, 2, 1):
        lanes = ir.Constant(_INTS, [(lane + half) % LANES for lane in range(LANES)])
        vector = builder.fadd(vector, builder.shuffle_vector(vector, vector, lanes), flags=_FLAGS)
    return builder.extract_element(vector, _I32(0))
