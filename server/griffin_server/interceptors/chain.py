"""The one gRPC interceptor: it runs each call of package griffin.v1 inside the others, in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from griffin_server.interceptors.call import Call, Context, Interceptor
from griffin_server.interceptors.drain import Drain
from griffin_server.interceptors.errors import to_status
from griffin_server.interceptors.malformed import (
    checked,
    checked_stream,
    refuse_malformed,
    tolerant,
)
from griffin_server.interceptors.request_id import identify
from griffin_server.interceptors.telemetry import CallTelemetry
from griffin_server.telemetry.metrics import Metrics

if TYPE_CHECKING:  # it brings torch, and the server listens before that is imported
    from griffin_server.telemetry.tracing import Tracing

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of package ``griffin.v1``. Calls of health and reflection pass unchanged,
    except that malformed requests are refused."""

    def __init__(self, metrics: Metrics) -> None:
        self.drain = Drain()
        self._telemetry = CallTelemetry(metrics)
        self._order: tuple[Interceptor, ...] = (
            self.drain.count,  # outermost: a call runs until its status has been sent
            self._telemetry.observe,  # observes refusals and errors as well
            to_status,  # turns what is raised further in into a status
            self.drain.admit,
            identify,  # after admit: a call that is refused there has no request id
            refuse_malformed,  # after identify: the client can find the refusal in the log
        )

    def open(self, tracing: Tracing) -> None:
        """Admits calls from now on, and traces them."""
        self._telemetry.tracing = tracing
        self.drain.open()

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
            "request_deserializer": tolerant(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.request_streaming:  # only reflection's
            return grpc.stream_stream_rpc_method_handler(
                checked_stream(handler.stream_stream), **coders
            )
        if handler.response_streaming:
            streaming = handler.unary_stream
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, streaming) if ours else checked(streaming), **coders
            )
        unary = handler.unary_unary
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, unary) if ours else checked(unary), **coders
        )

    def _unary(self, method: str, behavior: Callable[[Any, Context], Awaitable[Any]]) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with self._around("unary", method, request, context) as sent:
                response = await behavior(request, context)
                sent()
                return response

        return call

    def _stream(self, method: str, behavior: Callable[[Any, Context], AsyncIterator[Any]]) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._around("server_stream", method, request, context) as sent:
                responses: Any = behavior(request, context)
                async with aclosing(responses):
                    async for response in responses:
                        sent()
                        yield response

        return call

    @asynccontextmanager
    async def _around(
        self, kind: str, method: str, request: Any, context: Context
    ) -> AsyncIterator[Callable[[], None]]:
        """Enters all interceptors. Yields the function that counts a response."""
        call = Call(kind=kind, method=method, request=request, context=context)
        async with AsyncExitStack() as stack:
            for interceptor in self._order:
                await stack.enter_async_context(interceptor(call))
            assert call.counts is not None, "telemetry comes before the method"
            yield call.counts.sent
