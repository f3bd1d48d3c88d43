"""What happens around every call of ours: request id, error to status, one log line, a span."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeAlias, cast
from uuid import uuid4

import grpc
import structlog

from griffin_core.errors import EngineFault, EngineStopped, GriffinError, InvalidRequest
from griffin_server.ops.metrics import GrpcCall, Metrics
from griffin_server.ops.status import abort, code_of, code_of_cancel
from griffin_server.ops.tracing import Tracing, spans_var

REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID = 128

request_id_var: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the call that is being served."""

log = structlog.get_logger("griffin.rpc")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context = grpc.aio.ServicerContext[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of package ``griffin.v1``; health and reflection pass untouched."""

    def __init__(self, metrics: Metrics, tracing: Tracing) -> None:
        self._metrics = metrics
        self._tracing = tracing
        self.active = 0
        """Calls being served."""
        self._closed = False
        self._refusal: str | None = "the server is starting"
        self._idle = asyncio.Event()

    def open(self) -> None:
        """Lets calls in."""
        if not self._closed:
            self._refusal = None

    @property
    def serving(self) -> bool:
        """Whether calls are let in."""
        return self._refusal is None

    async def close(self, grace_s: float) -> None:
        """Refuses new calls, and waits for the running ones, so long at most."""
        self._closed = True
        self._refusal = "the server is shutting down"
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
        method = handler_call_details.method
        if handler is None or not method.startswith("/griffin.v1."):
            return cast("Handler | None", handler)
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            behavior = self._stream(method, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(behavior, **coders)
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary), **coders
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
        spans = self._tracing.call(method, context.invocation_metadata())
        spans_var.set(spans)
        self.active += 1
        code = "OK"
        try:
            if self._refusal is not None:
                raise EngineStopped(self._refusal)
            request_id = _request_id(request, context)
            request_id_var.set(request_id)
            structlog.contextvars.bind_contextvars(request_id=request_id)
            spans.note(request_id=request_id)
            await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
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
            self.active -= 1
            if self._closed and not self.active:
                self._idle.set()
            seconds = time.perf_counter() - clock
            counted.handled(code, seconds)
            spans.end(code)
            log.info("call", method=method, code=code, seconds=round(seconds, 6))


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
