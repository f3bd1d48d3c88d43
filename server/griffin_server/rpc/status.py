"""The table from errors to gRPC statuses, with google.rpc details."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from griffin_core.errors import (
    CapacityExhausted,
    DeadlinePassed,
    EngineFault,
    EngineStopped,
    FingerprintMismatch,
    GriffinError,
    HandoffBroken,
    InvalidRequest,
    NonFiniteLogits,
    NotReady,
    PrefillUnavailable,
    ReaderTooSlow,
    SessionBusy,
    SessionClosed,
    SessionNotFound,
)

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "griffin.v1"

MOST_WORDS_BYTES, MOST_FIELD_BYTES = 1000, 200
"""Of a message or description, and of a field's name, in UTF-8. gRPC's clients refuse a status with
more than 8 KiB of metadata, and say RESOURCE_EXHAUSTED in its place. The message goes out twice:
percent-encoded, three bytes for one at worst, and in the details, which are base64, with as long a
description. Together they stay below 6.5 KiB."""

LATE_S = 0.1
"""A client's clock began before ours, by what its call was under way: with less than this left, a
call that is cancelled was cancelled by its deadline."""

# Error -> code and the machine-readable reason of its ErrorInfo. Looked up along the error's bases.
CODES: dict[type[GriffinError], tuple[grpc.StatusCode, str]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    SessionNotFound: (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"),
    SessionBusy: (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_BUSY"),
    SessionClosed: (grpc.StatusCode.CANCELLED, "SESSION_CLOSED"),
    ReaderTooSlow: (grpc.StatusCode.ABORTED, "READER_TOO_SLOW"),
    CapacityExhausted: (grpc.StatusCode.RESOURCE_EXHAUSTED, "CAPACITY_EXHAUSTED"),
    FingerprintMismatch: (grpc.StatusCode.FAILED_PRECONDITION, "FINGERPRINT_MISMATCH"),
    # Both are worth another try: the handoff is gone, the request is not at fault.
    HandoffBroken: (grpc.StatusCode.UNAVAILABLE, "HANDOFF_BROKEN"),
    PrefillUnavailable: (grpc.StatusCode.UNAVAILABLE, "PREFILL_UNAVAILABLE"),
    DeadlinePassed: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    NonFiniteLogits: (grpc.StatusCode.INTERNAL, "NON_FINITE_LOGITS"),
    NotReady: (grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
    EngineStopped: (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    EngineFault: (grpc.StatusCode.INTERNAL, "ENGINE_FAULT"),
    GriffinError: (grpc.StatusCode.INTERNAL, "INTERNAL"),
}


def code_of(error: GriffinError) -> tuple[grpc.StatusCode, str]:
    """Status code and reason of an error."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def code_of_cancel(context: grpc.aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    """Status code of a call that is cancelled, as its client sees it."""
    left_s = context.time_remaining()
    late = left_s is not None and left_s < LATE_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


def words(text: str, most_bytes: int = MOST_WORDS_BYTES) -> str:
    """A text that can go into a status, whoever wrote it: what cannot be printed or is not UTF-8 is
    escaped, and what is too long is cut.

    Args:
        most_bytes: in UTF-8.
    """
    # A character is a byte at least: more of them need not be looked at.
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most_bytes]
    ).encode()
    if len(shown) <= most_bytes and len(text) <= most_bytes:
        return shown.decode()
    return shown[: most_bytes - 3].decode(errors="ignore") + "..."


def status_of(error: GriffinError) -> tuple[grpc.StatusCode, Status]:
    """The whole status of an error."""
    code, reason = code_of(error)
    status = Status(
        code=code.value[0],
        message=words(str(error)),
        details=_packed([ErrorInfo(reason=reason, domain=DOMAIN), *_details(error)]),
    )
    return code, status


def _details(error: GriffinError) -> list[Message]:
    if isinstance(error, InvalidRequest):
        violation = BadRequest.FieldViolation(
            field=words(error.field, MOST_FIELD_BYTES),
            description=words(f"got {error.given}; allowed: {error.allowed}"),
        )
        return [BadRequest(field_violations=[violation])]
    if isinstance(error, CapacityExhausted | NotReady) and error.retry_after_s is not None:
        info = RetryInfo()
        info.retry_delay.FromMilliseconds(int(error.retry_after_s * 1000))
        return [info]
    return []


def _packed(details: Sequence[Message]) -> list[any_pb2.Any]:
    packed = []
    for detail in details:
        wrapper = any_pb2.Any()
        wrapper.Pack(detail)
        packed.append(wrapper)
    return packed


def details_of(metadata: Sequence[tuple[str, str | bytes]] | None) -> Status | None:
    """The status a peer sent with its trailing metadata, if it did and it can be read."""
    for key, value in metadata or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            with suppress(DecodeError):
                return Status.FromString(value)
    return None


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: GriffinError) -> NoReturn:
    """Ends the call with the error's status."""
    code, status = status_of(error)
    await context.abort(
        code, status.message, trailing_metadata=((DETAILS_KEY, status.SerializeToString()),)
    )
    raise AssertionError("abort returned")
