"""Reading a message's fields."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

from griffin.v1 import generation_pb2 as pb
from griffin_core.errors import InvalidRequest

N = TypeVar("N", bound=str)


def exactly_one(name: str, given: Mapping[N, bool]) -> N:
    """The one of several fields that a request sets.

    Args:
        name: what the fields have in common, for the error.
        given: by the name of each field, whether it is set.

    Raises:
        InvalidRequest: none or several are set.
    """
    names = [field for field, is_given in given.items() if is_given]
    if len(names) != 1:
        shown = " and ".join(names) if names else "none"
        allowed = f"exactly one of {', '.join(given)}, not empty"
        raise InvalidRequest(name, shown, allowed)
    return names[0]


def set_fields(message: Any, *names: str) -> dict[str, Any]:
    """The values of those optional fields that are set. The core has defaults for the others."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def seed_of(message: pb.Sampling | pb.ScoreRequest | pb.AnalyzePromptRequest) -> int:
    """The seed of a request, or a random one if it sets none."""
    return message.seed if message.HasField("seed") else secrets.randbits(64)
