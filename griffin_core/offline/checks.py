"""Checks of what callers give to ``LLM``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeVar

from griffin_core.errors import CapacityExhausted, InvalidRequest
from griffin_core.sampling.params import LARGEST_SEED

T = TypeVar("T")


def check(name: str, given: object, holds: bool, allowed: str) -> None:
    """Raises InvalidRequest unless a condition holds."""
    if not holds:
        raise InvalidRequest(name, given, allowed)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Makes errors name the prompt that they are about."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{place}.{error.field}", error.given, error.allowed) from error
    except CapacityExhausted as error:
        raise CapacityExhausted(f"{place}: {error}", retry_after_s=None) from error


def one_each(name: str, given: T | Sequence[T], count: int) -> list[T]:
    """One value for each of ``count`` prompts.

    Raises:
        InvalidRequest: a list of another length was given.
    """
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise InvalidRequest(name, f"{len(given)} for {count} prompts", "one, or one for each")
    return list(given)


def pairs(name: str, given: Iterable[Any], content: str) -> list[tuple[Any, Any]]:
    """The pairs that are to be scored.

    Args:
        name: what the caller calls them.
        content: what a pair consists of.

    Raises:
        InvalidRequest: it is no list, or an element is no pair.
    """
    check(name, given, isinstance(given, Iterable) and not isinstance(given, str), "a list")
    listed = list(given)
    for index, pair in enumerate(listed):
        holds = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        check(f"{name}[{index}]", pair, holds, f"a pair: {content}")
    return listed


def seeds_of(seed: int | Sequence[int], count: int) -> list[int]:
    """The seed of each of ``count`` prompts: those given, or ``seed`` and the numbers after it.

    Raises:
        InvalidRequest: a seed is out of range, or their number is wrong.
    """
    seeds = one_each("seed", seed, count)
    for given in seeds:
        holds = isinstance(given, Integral) and 0 <= given <= LARGEST_SEED
        check("seed", given, holds, "[0, 2^64), a whole number")
    if isinstance(seed, Sequence):
        return seeds
    return [(seed + index) % (LARGEST_SEED + 1) for index in range(count)]
