"""From the status of a failed Prefill call to the error of the request that waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from griffin_core.errors import (
    CapacityExhausted,
    DeadlinePassed,
    EngineFault,
    FingerprintMismatch,
    GriffinError,
    HandoffBroken,
    ProtocolMismatch,
)
from griffin_server.rpc.status import DETAILS_KEY, printable

LONGEST_RETRY_S = 60.0
"""The longest wait that a client is told of what a prefill server says."""

log = structlog.get_logger("griffin.prefill")


def error_of(target: str, error: grpc.aio.AioRpcError) -> GriffinError:
    """The error that a failed call to the prefill server at ``target`` means for its request. What
    the server says in words goes to the log and not to the client, who may be meant to take it for
    this server's."""
    log.warning(
        "prefill failed",
        target=target,
        code=error.code().name,
        details=printable(error.details() or ""),
    )
    message = f"prefill server {target}: the call ended with {error.code().name}"
    match error.code():
        case grpc.StatusCode.FAILED_PRECONDITION:
            if _reason(error) == "PROTOCOL_MISMATCH":
                return ProtocolMismatch(f"{message}: no common version of the protocol")
            return FingerprintMismatch(f"{message}: it holds another model")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return CapacityExhausted(message, retry_after_s=_retry_after_s(error) or 1.0)
        case grpc.StatusCode.DEADLINE_EXCEEDED:  # the client's deadline, not the server's fault
            return DeadlinePassed(message)
        case (
            grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.INTERNAL
            | grpc.StatusCode.UNIMPLEMENTED  # the target is not a prefill server
        ):
            return EngineFault(message)
        case _:
            return HandoffBroken(message)


def details_of(metadata: Sequence[tuple[str, str | bytes]] | None) -> Status | None:
    """The status in a peer's trailing metadata; None if it has none that can be read."""
    for key, value in metadata or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            with suppress(DecodeError):
                return Status.FromString(value)
    return None


def _reason(error: grpc.aio.AioRpcError) -> str:
    status = details_of(tuple(error.trailing_metadata() or ()))
    info = ErrorInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return str(info.reason)
    return ""


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    status = details_of(tuple(error.trailing_metadata() or ()))
    info = RetryInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            seconds = float(info.retry_delay.ToMilliseconds() / 1000)
            return min(max(seconds, 0.0), LONGEST_RETRY_S)
    return None
