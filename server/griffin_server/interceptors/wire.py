"""Looks at a request's bytes before they are parsed (protobuf.dev/programming-guides/encoding)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

MOST_FIELDS = 64
"""The most fields at the top of a message that are looked at."""

MOST_VARINT_BYTES = 5
"""The most bytes of a number of 32 bits."""


def number_fields(message_type: Any) -> dict[int, str]:
    """The fields of a message type that are lists of uint32, by their numbers."""
    return {
        field.number: field.name
        for field in message_type.DESCRIPTOR.fields
        if field.is_repeated and field.type == FieldDescriptor.TYPE_UINT32
    }


def least_counts(serialized: bytes) -> Iterator[tuple[int, int]]:
    """The fields at the top of a message that have a length: each one's number, and how many 32-bit
    numbers it holds at least if it is a packed list of them. Ends where the bytes are no message.
    """
    at, size = 0, len(serialized)
    for _ in range(MOST_FIELDS):
        tag, at = _varint(serialized, at)
        match tag & 7:
            case 2:  # a length and as many bytes
                length, at = _varint(serialized, at)
                yield tag >> 3, length // MOST_VARINT_BYTES
                at += length
            case 0:  # a number
                _, at = _varint(serialized, at)
            case 1:  # 64 bits
                at += 8
            case 5:  # 32 bits
                at += 4
            case _:
                return
        if at >= size:
            return


def _varint(serialized: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a place, and the place after it."""
    value = 0
    for shift, byte in enumerate(serialized[at : at + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    return value, len(serialized)
