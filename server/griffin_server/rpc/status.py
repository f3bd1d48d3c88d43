"""The table from errors to gRPC status codes, and statuses with google.rpc details."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
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
    ProtocolMismatch,
    ReaderTooSlow,
    SessionBusy,
    SessionClosed,
    SessionNotFound,
)
from griffin_server.security.errors import PermissionDenied, Unauthenticated

DETAILS_KEY = "grpc-status-details-bin"
"""The metadata key under which gRPC sends a ``google.rpc.Status``."""

DOMAIN = "griffin.v1"

MAX_MESSAGE_BYTES, MAX_FIELD_BYTES = 1000, 200
"""The most bytes, in UTF-8, of a message or description and of a field's name. gRPC's clients
refuse a status with more than 8 KiB of metadata and report RESOURCE_EXHAUSTED instead. The message
is sent twice: percent-encoded, which takes up to three bytes for one, and in the details, which are
base64 and hold a description of up to the same length. Together they stay below 6.5 KiB."""

LATE_S = 0.1
"""The client's deadline timer started earlier, by the network latency. So a call that is cancelled
with less time left than this was cancelled by its deadline."""

# An error's code and the machine-readable reason of its ErrorInfo. An error that is not listed
# takes the row of its nearest base class.
CODES: dict[type[GriffinError], tuple[grpc.StatusCode, str]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    SessionNotFound: (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"),
    SessionBusy: (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_BUSY"),
    SessionClosed: (grpc.StatusCode.CANCELLED, "SESSION_CLOSED"),
    ReaderTooSlow: (grpc.StatusCode.ABORTED, "READER_TOO_SLOW"),
    CapacityExhausted: (grpc.StatusCode.RESOURCE_EXHAUSTED, "CAPACITY_EXHAUSTED"),
    FingerprintMismatch: (grpc.StatusCode.FAILED_PRECONDITION, "FINGERPRINT_MISMATCH"),
    ProtocolMismatch: (grpc.StatusCode.FAILED_PRECONDITION, "PROTOCOL_MISMATCH"),
    # The client may retry both: the handoff failed, and the request is not at fault.
    HandoffBroken: (grpc.StatusCode.UNAVAILABLE, "HANDOFF_BROKEN"),
    PrefillUnavailable: (grpc.StatusCode.UNAVAILABLE, "PREFILL_UNAVAILABLE"),
    DeadlinePassed: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    NonFiniteLogits: (grpc.StatusCode.INTERNAL, "NON_FINITE_LOGITS"),
    NotReady: (grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
    EngineStopped: (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    PermissionDenied: (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    EngineFault: (grpc.StatusCode.INTERNAL, "ENGINE_FAULT"),
    GriffinError: (grpc.StatusCode.INTERNAL, "INTERNAL"),
}


def code_of(error: GriffinError) -> tuple[grpc.StatusCode, str]:
    """An error's status code and reason."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def code_of_cancel(context: grpc.aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    """The status code that the client of a cancelled call sees."""
    left_s = context.time_remaining()
    late = left_s is not None and left_s < LATE_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


def printable(text: str, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """Makes any text fit for a status: characters that cannot be printed or encoded in UTF-8 are
    escaped, and a text that is too long is cut.

    Args:
        max_bytes: the most bytes of the result in UTF-8.
    """
    # Each character takes at least one byte, so the later ones need not be escaped.
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:max_bytes]
    ).encode()
    if len(shown) <= max_bytes and len(text) <= max_bytes:
        return shown.decode()
    return shown[: max_bytes - 3].decode(errors="ignore") + "..."


def status_of(error: GriffinError) -> tuple[grpc.StatusCode, Status]:
    """An error's status, with its details."""
    code, reason = code_of(error)
    status = Status(
        code=code.value[0],
        message=printable(str(error)),
        details=_packed([ErrorInfo(reason=reason, domain=DOMAIN), *_details(error)]),
    )
    return code, status


def _details(error: GriffinError) -> list[Message]:
    if isinstance(error, InvalidRequest):
        violation = BadRequest.FieldViolation(
            field=printable(error.field, MAX_FIELD_BYTES),
            description=printable(f"got {error.given}; allowed: {error.allowed}"),
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


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: GriffinError) -> NoReturn:
    """Ends a call with an error's status."""
    code, status = status_of(error)
    await context.abort(
        code, status.message, trailing_metadata=((DETAILS_KEY, status.SerializeToString()),)
    )
    raise AssertionError("abort returned")
