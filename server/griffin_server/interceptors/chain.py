"""The one gRPC interceptor: it runs each call of package griffin.v1 inside the others, in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from griffin_server.interceptors.authenticate import Authentication
from griffin_server.interceptors.call import Call, Context, Interceptor
from griffin_server.interceptors.deadline import CallClock
from griffin_server.interceptors.drain import Drain
from griffin_server.interceptors.errors import to_status
from griffin_server.interceptors.give_back import MemoryRelease
from griffin_server.interceptors.malformed import (
    Parser,
    checked,
    checked_stream,
    refuse_malformed,
    tolerant,
)
from griffin_server.interceptors.request_id import identify
from griffin_server.interceptors.telemetry import CallTelemetry
from griffin_server.interceptors.wire import number_fields
from griffin_server.security.identity import Identity
from griffin_server.telemetry.metrics import Metrics

if TYPE_CHECKING:  # it brings torch, and the server listens before that is imported
    from griffin_server.telemetry.tracing import Tracing

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Parse: TypeAlias = Callable[[bytes], Any]

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
"""The one method that asks nobody who they are: probes have no identity."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of package ``griffin.v1``. The frames that an error has passed through are
    cleared: they hold the request, and the error is part of cycles, so that requests would stay in
    memory until the garbage collector finds them. Calls of health and reflection pass unchanged,
    except that strangers and malformed requests are refused; health checks are open to strangers.

    Args:
        identity: says who makes a call.
        drain: admits calls, and counts those that run; several interceptors may share it.
        max_call_s: the longest call.
    """

    def __init__(
        self, metrics: Metrics, identity: Identity, *, drain: Drain, max_call_s: float
    ) -> None:
        self.drain = drain
        self._identity = identity
        self._max_call_s = max_call_s
        self._telemetry = CallTelemetry(metrics)
        self._parser = Parser()
        self._number_fields: dict[str, dict[int, str]] = {}
        self._order: tuple[Interceptor, ...] = (
            self.drain.count,  # outermost: a call runs until its status has been sent
            MemoryRelease().after_large,
            self._telemetry.observe,  # observes refusals and errors as well
            to_status,  # turns what is raised further in into a status
            self.drain.admit,
            Authentication(identity).authenticate,  # nothing is parsed for strangers
            self._parser.parse,
            identify,  # after admit: a call that is refused there has no request id
            refuse_malformed,  # after identify: the client can find the refusal in the log
        )

    def open(
        self,
        tracing: Tracing,
        max_request_bytes: int | None = None,
        context_length: int | None = None,
    ) -> None:
        """Admits calls from now on, and traces them.

        Args:
            max_request_bytes: larger requests are refused unparsed; None for as many as gRPC
                receives.
            context_length: requests with more token ids are refused unparsed; None for any.
        """
        self._telemetry.tracing = tracing
        self._parser.most, self._parser.most_numbers = max_request_bytes, context_length
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
        decode = tolerant(handler.request_deserializer)
        if method not in self._number_fields:
            # FromString is a method of the message's class.
            self._number_fields[method] = number_fields(handler.request_deserializer.__self__)
        serializer = {"response_serializer": handler.response_serializer}
        if not method.startswith("/griffin.v1."):
            return self._of_others(method, handler, decode, serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, handler.unary_stream, decode), **serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary, decode), **serializer
        )

    def _of_others(
        self, method: str, handler: Any, decode: Parse, serializer: dict[str, Any]
    ) -> Handler:
        """A method of health or reflection."""
        ask = _ask_nobody if method == HEALTH_CHECK else self._ask
        if handler.request_streaming:  # only reflection's
            return grpc.stream_stream_rpc_method_handler(
                checked_stream(handler.stream_stream, decode, ask), **serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                checked(handler.unary_stream, decode, ask), **serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            checked(handler.unary_unary, decode, ask), **serializer
        )

    async def _ask(self, context: Context) -> None:
        await self._identity.principal(context)

    def _unary(
        self, method: str, behavior: Callable[[Any, Context], Awaitable[Any]], decode: Parse
    ) -> Any:
        async def call(request: bytes, context: Context) -> Any:
            around = self._around("unary", method, request, decode, context)
            del request
            clock = CallClock(self._max_call_s)
            try:
                async with around as (made, sent):
                    response = await clock.answer(behavior(made.request, context))
                    sent(response.ByteSize())
                    return response
            except BaseException as error:
                clear_frames(error.__traceback__)
                raise

        return call

    def _stream(
        self, method: str, behavior: Callable[[Any, Context], AsyncIterator[Any]], decode: Parse
    ) -> Any:
        async def call(request: bytes, context: Context) -> AsyncIterator[Any]:
            around = self._around("server_stream", method, request, decode, context)
            del request
            clock = CallClock(self._max_call_s)
            try:
                async with around as (made, sent):
                    responses: Any = behavior(made.request, context)
                    async with aclosing(responses), aclosing(clock.answers(responses)) as answers:
                        async for response in answers:
                            sent(response.ByteSize())
                            yield response
            except BaseException as error:
                clear_frames(error.__traceback__)
                raise

        return call

    @asynccontextmanager
    async def _around(
        self, kind: str, method: str, request: bytes, decode: Parse, context: Context
    ) -> AsyncIterator[tuple[Call, Callable[[int], None]]]:
        """Enters all interceptors. Yields the call, and the function that counts a response."""
        call = Call(
            kind=kind,
            method=method,
            request=request,
            parse=decode,
            number_fields=self._number_fields[method],
            context=context,
        )
        async with AsyncExitStack() as stack:
            for interceptor in self._order:
                await stack.enter_async_context(interceptor(call))
            assert call.counts is not None, "telemetry comes before the method"
            try:
                yield call, call.counts.sent
            finally:
                call.request = None


async def _ask_nobody(context: Context) -> None:
    pass
