"""One call, as the interceptors around it see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from griffin_server.security.principal import Principal
from griffin_server.telemetry.metrics import GrpcCall

if TYPE_CHECKING:  # it brings torch, and the server listens before that is imported
    from griffin_server.telemetry.tracing import CallSpans

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(kw_only=True)
class Call:
    """A call that is being served.

    Args:
        kind: "unary" or "server_stream", for metrics.
        method: "/package.Service/Method".
        request: the request's bytes; once parsed, the message or a ``Malformed`` in its place.
        parse: makes the message of the bytes.
        number_fields: see ``wire.number_fields``.
        counts: counts the call's messages; set by telemetry.
        spans: the call's trace; set by telemetry, None while the server is loading.
        code: the name of the status that ends the call; set by ``errors``.
        principal: who makes the call; set by ``authenticate``.
    """

    kind: str
    method: str
    request: Any
    parse: Callable[[bytes], Any]
    number_fields: Mapping[int, str]
    context: Context
    principal: Principal | None = None
    counts: GrpcCall | None = None
    spans: CallSpans | None = None
    code: str = "OK"


Interceptor: TypeAlias = Callable[[Call], AbstractAsyncContextManager[None]]
"""What happens around a call, as a context manager: the call runs inside of it."""
