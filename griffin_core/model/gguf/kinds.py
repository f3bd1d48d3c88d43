"""Kinds of values of GGUF keys."""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["count", "counts", "integer", "number", "flag", "text", "texts", "numbers", "any"]

KINDS: dict[Kind, str] = {
    "count": "an integer of at least 1",
    "counts": "an integer of at least 1, the same for every layer",
    "integer": "an integer of at least 0",
    "number": "a finite number of at least 0",
    "flag": "true or false",
    "text": "a text",
    "texts": "a list of texts",
    "numbers": "a list of numbers",
    "any": "any value",
}


def is_integer(value: object, least: int) -> bool:
    """Whether a value is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_of(kind: Kind, value: object) -> bool:
    """Whether a value is of a kind."""
    match kind, value:
        case "count", _:
            return is_integer(value, 1)
        case "counts", list():
            return len(set(value)) == 1 and is_integer(value[0], 1)
        case "counts", _:
            return is_integer(value, 1)
        case "integer", _:
            return is_integer(value, 0)
        case "number", int() | float():
            return is_number(value) and value >= 0
        case "flag", bool():
            return True
        case "text", str():
            return True
        case "texts", list():
            return all(isinstance(item, str) for item in value)
        case "numbers", list():
            return all(is_number(item) for item in value)
        case "any", _:
            return True
    return False
