"""The errors that a call can raise.

::

    GriffinClientError          code, message, reason, request_id
    ├── InvalidArgument         a field of the request is wrong: violations, field -> problem
    ├── Unauthenticated         the server does not know who calls
    ├── PermissionDenied        the caller may not do this
    ├── NotFound                no session of the caller has this id (any more)
    ├── FailedPrecondition      the session is busy, or the servers hold different models
    ├── ResourceExhausted       the server has no room: retry_after_s, when to try again
    ├── Unavailable             the server, or its prefill server, cannot be reached
    ├── DeadlineExceeded        the timeout ran out
    ├── Cancelled               the call was cancelled, or its session was closed
    ├── Aborted                 the stream was not read for too long
    └── ServerFault             a bug on the server's side

The client retries ``Unavailable`` and ``ResourceExhausted`` itself, as ``max_retries`` allows; see
``griffin_client.retry``. A keyword that a method does not know raises ``TypeError``, as in any call
of Python.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TypeVar

import grpc

from griffin_client.status_details import StatusDetails, parse_details

R = TypeVar("R")


class GriffinClientError(Exception):
    """Base class of all errors that a call raises.

    Attributes:
        code: the call's gRPC status code.
        message: the server's message.
        reason: machine-readable reason, such as "SESSION_NOT_FOUND"; empty if the status does not
            come from a Griffin server.
        request_id: the id under which the server's logs have the call; empty if it sent none.
    """

    def __init__(self, code: grpc.StatusCode, message: str, details: StatusDetails) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.reason = details.reason
        self.request_id = details.request_id
        self._details = details


class InvalidArgument(GriffinClientError):
    """A field of the request has a wrong type or is out of range.

    The client raises it before the call for values that a request cannot hold, with the same
    fields as the server does for values out of range.
    """

    @property
    def violations(self) -> Mapping[str, str]:
        """Field of the request -> what was given and what is allowed."""
        return self._details.violations


class Unauthenticated(GriffinClientError):
    """The call has no key or token, or the server does not accept it."""


class PermissionDenied(GriffinClientError):
    """The server knows who calls, and does not allow the call."""


class NotFound(GriffinClientError):
    """No session of the caller has this id: there never was one, it is another caller's, or it
    expired, was closed or was evicted."""


class FailedPrecondition(GriffinClientError):
    """The session is still busy with an earlier turn, or the servers hold different models."""


class ResourceExhausted(GriffinClientError):
    """The server has no room for the request, or the message is too large."""

    @property
    def retry_after_s(self) -> float | None:
        """Seconds until another try is worth it; None if the request will never fit."""
        return self._details.retry_after_s


class Unavailable(GriffinClientError):
    """The server, or its prefill server, cannot be reached, is loading or is shutting down."""

    @property
    def retry_after_s(self) -> float | None:
        """Seconds until another try is worth it; None if the server did not say."""
        return self._details.retry_after_s


class DeadlineExceeded(GriffinClientError):
    """The timeout ran out."""


class Cancelled(GriffinClientError):
    """The call was cancelled, or another call closed its session."""


class Aborted(GriffinClientError):
    """The server ended a stream that its client had stopped reading."""


class ServerFault(GriffinClientError):
    """Any other status: a bug on the server's side."""


# Status code -> exception: the client's side of the server's table of errors.
EXCEPTIONS: dict[grpc.StatusCode, type[GriffinClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.ABORTED: Aborted,
}


def invalid_argument(field: str, value: object, problem: str) -> InvalidArgument:
    """The error for a value that cannot be sent, as if the server had refused it."""
    description = f"got {reprlib.repr(value)}; {problem}"
    details = StatusDetails(violations={field: description}, reason="INVALID_REQUEST")
    return InvalidArgument(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {description}", details)


def parsed(response: R | None) -> R:
    """The response, unless it is None.

    Raises:
        ServerFault: its bytes are no message. gRPC's asynchronous calls give None for those, where
            its synchronous ones fail with INTERNAL.
    """
    if response is None:
        message = "the server's answer is no message of this service"
        raise ServerFault(grpc.StatusCode.INTERNAL, message, parse_details(()))
    return response


def from_rpc_error(error: grpc.RpcError) -> GriffinClientError:
    """The exception for a failed call of the sync or the async client."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    initial = error.initial_metadata() or ()  # type: ignore[attr-defined]  # the stubs lack it
    trailing = error.trailing_metadata() or ()
    kind = EXCEPTIONS.get(code, ServerFault)
    return kind(code, message, parse_details((*initial, *trailing)))
