"""Random messages and bytes, from a generator that a test seeds."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def mutated(rng: random.Random, whole: bytes, *, times: int) -> bytes:
    """The same bytes but for a few that are put in, left out or changed, so many times."""
    data = bytearray(whole)
    for _ in range(times):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(3):
            case 0:
                data[at:at] = rng.randbytes(rng.randint(1, 4))
            case 1:
                del data[at : at + rng.randint(1, 4)]
            case _:
                data[at : at + 1] = rng.randbytes(1)
    return bytes(data)


def fill(rng: random.Random, message: Message, *, share: float, odd: float) -> None:
    """Sets a share of the fields, and some of those to odd values."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() > share:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields_by_name.values()
            if value.message_type is None:
                getattr(message, field.name)[value_of(rng, key, odd)] = value_of(rng, value, odd)
        elif field.is_repeated:
            for _ in range(rng.choice([1, 2, 5])):
                if field.message_type is not None:
                    fill(rng, getattr(message, field.name).add(), share=share, odd=odd)
                else:
                    getattr(message, field.name).append(value_of(rng, field, odd))
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            fill(rng, getattr(message, field.name), share=share, odd=odd)
        else:
            setattr(message, field.name, value_of(rng, field, odd))


TEXTS = ["", "a", "user", "assistant", "x" * 3000, "Zürich 🌍", "\x00\x1b[0m", "{{ 1/0 }}", "<s>"]
INTEGERS = [0, 1, 2, 5, 200, 256, 259, 2**31 - 1]
FLOATS = [0.0, 0.5, 1.0, 1e-9, -1.0, 1e300, float("inf"), float("nan")]


def value_of(rng: random.Random, field: FieldDescriptor, odd: float) -> Any:
    if rng.random() >= odd:
        return usual_value(rng, field)
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return rng.randbytes(rng.choice([0, 1, 16, 32, 1000]))
            return rng.choice(TEXTS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice(FLOATS)
        case FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice([value for value in FLOATS if value != 1e300])
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice([*(value.number for value in field.enum_type.values), 99])
        case FieldDescriptor.CPPTYPE_UINT64:
            return rng.choice([*INTEGERS, 2**64 - 1])
        case FieldDescriptor.CPPTYPE_UINT32:
            return rng.choice([*INTEGERS, 2**32 - 1])
        case _:
            return rng.choice([*INTEGERS, -1, -(2**31)])


def usual_value(rng: random.Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            text = rng.choice(["user", "assistant", "abc"])
            return text if field.type == FieldDescriptor.TYPE_STRING else text.encode()
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice([0.5, 1.0])
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice(field.enum_type.values).number
        case _:
            return rng.choice([1, 2, 5])
