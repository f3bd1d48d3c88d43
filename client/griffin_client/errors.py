"""What a call can raise.

::

    GriffinClientError          code, message, reason, request_id
    ├── InvalidArgument         violations: field -> what is wrong with it
    ├── NotFound                no such session
    ├── FailedPrecondition      the session is busy, or the servers hold different models
    ├── ResourceExhausted       retry_after_s: when to come back, if the server knows
    ├── Unavailable             the server, or its prefill server, cannot be reached
    ├── DeadlineExceeded        the timeout ran out
    ├── Cancelled               the call was cancelled, or the session closed
    ├── Aborted                 nobody read what the call streamed, for too long
    └── ServerFault             a bug on the server's side
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

import grpc

from griffin_client.status_details import StatusDetails, parse_details


class GriffinClientError(Exception):
    """Base of all errors below.

    Args:
        code: the call's gRPC status code.
        message: the server's words.
        details: what came with the status.
    """

    def __init__(self, code: grpc.StatusCode, message: str, details: StatusDetails) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.reason = details.reason
        self.request_id = details.request_id
        self._details = details


class InvalidArgument(GriffinClientError):
    """A field of the request is out of range."""

    @property
    def violations(self) -> Mapping[str, str]:
        """Field -> what was given and what is allowed."""
        return self._details.violations


class NotFound(GriffinClientError):
    """No session of that id."""


class FailedPrecondition(GriffinClientError):
    """The session is still in an earlier turn, or Prefill and Decode hold different models."""


class ResourceExhausted(GriffinClientError):
    """The server has no room, or the message is too large."""

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which another try is worth it; None if it never will be."""
        return self._details.retry_after_s


class Unavailable(GriffinClientError):
    """The server, or its prefill server, cannot be reached or is shutting down."""


class DeadlineExceeded(GriffinClientError):
    """The timeout ran out."""


class Cancelled(GriffinClientError):
    """The call was cancelled, or its session closed by another."""


class Aborted(GriffinClientError):
    """The server ended a stream that its client had stopped reading."""


class ServerFault(GriffinClientError):
    """Any other status: a bug on the server's side."""


# The table back: status code -> exception.
EXCEPTIONS: dict[grpc.StatusCode, type[GriffinClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.ABORTED: Aborted,
}


def invalid_argument(field: str, given: object, problem: str) -> InvalidArgument:
    """For a value that cannot even be sent; as if the server had refused it."""
    description = f"got {reprlib.repr(given)}; {problem}"
    details = StatusDetails(violations={field: description}, reason="INVALID_REQUEST")
    return InvalidArgument(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {description}", details)


def from_rpc_error(error: grpc.RpcError) -> GriffinClientError:
    """The exception of a failed call, sync or async."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    initial = error.initial_metadata() or ()  # type: ignore[attr-defined]  # the stubs lack it
    trailing = error.trailing_metadata() or ()
    kind = EXCEPTIONS.get(code, ServerFault)
    return kind(code, message, parse_details((*initial, *trailing)))
