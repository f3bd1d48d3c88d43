"""What happens around every call of ours: request id, error to status, one log line, a span."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import uuid4

import grpc
import structlog
from google.protobuf.message import DecodeError

from griffin_core.errors import (
    EngineFault,
    EngineStopped,
    GriffinError,
    InvalidRequest,
    NotReady,
)
from griffin_server.rpc.status import abort, code_of, code_of_cancel
from griffin_server.telemetry.metrics import GrpcCall, Metrics

if TYPE_CHECKING:  # it brings torch, and a server answers before that is imported
    from griffin_server.telemetry.tracing import Tracing

REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID = 128

request_id_var: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the call that is being served."""

log = structlog.get_logger("griffin.rpc")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context = grpc.aio.ServicerContext[Any, Any]

LOADING_RETRY_S = 2.0
"""When to ask again a server whose model is still loading: that may take seconds or minutes."""


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """Stands for a request whose bytes are no message of the type that its method takes."""

    size: int
    why: str

    def error(self) -> InvalidRequest:
        """What its client is told."""
        return InvalidRequest(
            "request", f"{self.size} bytes ({self.why})", "a message of the method's request type"
        )


def _reader(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that raises nothing: gRPC would end the call with UNKNOWN, and log a traceback
    for what a client sent."""

    def read(serialized: bytes) -> Any:
        try:
            return deserialize(serialized)
        except DecodeError as error:
            return Malformed(size=len(serialized), why=str(error))

    return read


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of package ``griffin.v1``. Health and reflection pass as they are, but for
    malformed requests."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tracing: Tracing | None = None
        self.active = 0
        """Calls being served."""
        self._closed = False
        self._refusal: Callable[[], GriffinError] | None = _loading
        self._idle = asyncio.Event()

    def open(self, tracing: Tracing) -> None:
        """Lets calls in."""
        self._tracing = tracing
        if not self._closed:
            self._refusal = None

    @property
    def serving(self) -> bool:
        """Whether calls are let in."""
        return self._refusal is None

    async def close(self, grace_s: float) -> None:
        """Refuses new calls, and waits for the running ones, so long at most."""
        self._closed = True
        self._refusal = _shutting_down
        if self.active:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)

    def hurry(self) -> None:
        """Ends ``close`` at once."""
        self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        ours = method.startswith("/griffin.v1.")
        coders = {
            "request_deserializer": _reader(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming:  # reflection alone
            return grpc.stream_stream_rpc_method_handler(
                _checked_stream(handler.stream_stream), **coders
            )
        if handler.response_streaming:
            streaming = handler.unary_stream
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, streaming) if ours else _checked(streaming), **coders
            )
        unary = handler.unary_unary
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, unary) if ours else _checked(unary), **coders
        )

    def _unary(self, method: str, behavior: Callable[[Any, Context], Awaitable[Any]]) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with self._around("unary", method, request, context) as counted:
                response = await behavior(request, context)
                counted.sent()
                return response

        return call

    def _stream(self, method: str, behavior: Callable[[Any, Context], AsyncIterator[Any]]) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._around("server_stream", method, request, context) as counted:
                responses: Any = behavior(request, context)
                async with aclosing(responses):
                    async for response in responses:
                        counted.sent()
                        yield response

        return call

    @asynccontextmanager
    async def _around(
        self, kind: str, method: str, request: Any, context: Context
    ) -> AsyncIterator[GrpcCall]:
        clock = time.perf_counter()
        counted = self._metrics.grpc_call(kind, method)
        metadata = context.invocation_metadata()
        spans = self._tracing.call(method, metadata) if self._tracing else None
        self.active += 1
        code = "OK"
        try:
            if self._refusal is not None:
                raise self._refusal()
            request_id = _request_id(request, context)
            request_id_var.set(request_id)
            structlog.contextvars.bind_contextvars(request_id=request_id)
            if spans:
                spans.note(request_id=request_id)
            await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
            if isinstance(request, Malformed):
                raise request.error()
            yield counted
        except GriffinError as error:
            code = code_of(error)[0].name
            await abort(context, error)
        except (asyncio.CancelledError, GeneratorExit):
            code = code_of_cancel(context).name
            raise
        except grpc.aio.AbortError:
            code = context.code().name
            raise
        except Exception as error:
            code = "INTERNAL"
            log.exception("call failed", method=method)
            await abort(context, EngineFault(f"{type(error).__name__}: {error}"))
        finally:
            seconds = time.perf_counter() - clock
            counted.handled(code, seconds)
            if spans:
                spans.end(code)
            log.info("call", method=method, code=code, seconds=round(seconds, 6))
            self.active -= 1
            if self._closed and not self.active:
                self._idle.set()


def _loading() -> NotReady:
    return NotReady(
        "the server is starting: its model is still loading", retry_after_s=LOADING_RETRY_S
    )


def _shutting_down() -> EngineStopped:
    return EngineStopped("the server is shutting down")


def _request_id(request: Any, context: Context) -> str:
    given = getattr(request, "request_id", "")
    if not given:
        for key, value in context.invocation_metadata() or ():
            if key == REQUEST_ID_KEY:
                given = value if isinstance(value, str) else value.decode(errors="replace")
    if not given:
        return uuid4().hex
    if len(given) > MAX_REQUEST_ID or not (given.isascii() and given.isprintable()):
        raise InvalidRequest(
            "request_id", given, f"at most {MAX_REQUEST_ID} printable ASCII characters"
        )
    return str(given)


def _checked(behavior: Callable[[Any, Context], Any]) -> Any:
    """A method of one request, of another package, that answers a malformed one itself."""

    async def unary(request: Any, context: Context) -> Any:
        if isinstance(request, Malformed):
            await abort(context, request.error())
        return await behavior(request, context)

    return unary


def _checked_stream(behavior: Callable[[Any, Context], AsyncIterator[Any]]) -> Any:
    """The same for a method of many requests."""

    async def stream(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async def wellformed() -> AsyncIterator[Any]:
            async for request in requests:
                if isinstance(request, Malformed):
                    await abort(context, request.error())
                yield request

        async for response in behavior(wellformed(), context):
            yield response

    return stream
