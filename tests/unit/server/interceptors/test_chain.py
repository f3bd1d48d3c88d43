"""Around a call: its status, its counts and its request id, and how a server drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from griffin.v1 import generation_pb2 as pb
from griffin_core.errors import SessionNotFound
from griffin_server.interceptors.chain import CallInterceptor
from griffin_server.interceptors.drain import Drain
from griffin_server.security.identity import Callers
from griffin_server.settings import Settings
from griffin_server.telemetry.metrics import Metrics
from griffin_server.telemetry.tracing import Tracing
from tests.servers import eventually

METHOD = "/griffin.v1.GenerationService/CloseSession"


class Served:
    """A server with one method, which ``behave`` stands for."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.calls = CallInterceptor(
            self.metrics, Callers(Settings()), drain=Drain(), max_call_s=60
        )
        self.channel: Any = None

    async def behave(self, context: Any) -> None:
        """Replaced by a test."""

    async def method(self, request: Any, context: Any) -> Any:
        await self.behave(context)
        return pb.CloseSessionResponse()

    def call(self, request: bytes = b"", **options: Any) -> Any:
        return self.channel.unary_unary(METHOD)(request, timeout=10, **options)

    def handled(self, code: str) -> float | None:
        labels = {
            "grpc_type": "unary",
            "grpc_service": "griffin.v1.GenerationService",
            "grpc_method": "CloseSession",
            "grpc_code": code,
        }
        return self.metrics.registry.get_sample_value("grpc_server_handled_total", labels)

    async def counted(self, code: str) -> float | None:
        """See ``handled``, once there is a count: the client may have a call's status before the
        server's side of the call has ended."""
        await asyncio.to_thread(eventually, lambda: self.handled(code) is not None)
        return self.handled(code)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    server = grpc.aio.server(interceptors=(served.calls,))
    handler = grpc.unary_unary_rpc_method_handler(
        served.method,
        request_deserializer=pb.CloseSessionRequest.FromString,
        response_serializer=pb.CloseSessionResponse.SerializeToString,
    )
    service, _, name = METHOD.removeprefix("/").partition("/")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {name: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as served.channel:
        yield served
    await server.stop(0)


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_calls_before_the_model_is_loaded_are_refused_and_counted(served: Served) -> None:
    error = await refused(served.call())
    assert error.code() is grpc.StatusCode.UNAVAILABLE and "loading" in (error.details() or "")
    assert (await served.counted("UNAVAILABLE"), served.handled("OK")) == (1, None)
    assert served.calls.drain.active == 0


async def test_a_malformed_request_is_refused_with_a_request_id(served: Served) -> None:
    served.calls.open(Tracing("all"))
    call = served.call(b"\xff", metadata=(("x-request-id", "mine"),))
    assert dict(await call.initial_metadata())["x-request-id"] == "mine"
    error = await refused(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await served.counted("INVALID_ARGUMENT") == 1


async def abort(context: Any) -> None:
    await context.abort(grpc.StatusCode.ALREADY_EXISTS, "twice")


async def not_found(context: Any) -> None:
    raise SessionNotFound("s", "it has expired")


async def fail(context: Any) -> None:
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("behave", "code"), [(abort, "ALREADY_EXISTS"), (not_found, "NOT_FOUND"), (fail, "INTERNAL")]
)
async def test_the_status_that_the_client_gets_is_counted(
    served: Served, behave: Any, code: str
) -> None:
    served.calls.open(Tracing("all"))
    served.behave = behave  # type: ignore[method-assign]
    assert (await refused(served.call())).code().name == code
    assert await served.counted(code) == 1


async def call_that_waits(served: Served) -> tuple[asyncio.Future[Any], asyncio.Event]:
    """Begins a call that runs until the event is set."""
    served.calls.open(Tracing("all"))
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait(context: Any) -> None:
        begun.set()
        await go_on.wait()

    served.behave = wait  # type: ignore[method-assign]
    running = asyncio.ensure_future(served.call())
    await begun.wait()
    return running, go_on


async def test_draining_waits_for_running_calls_until_it_is_forced(served: Served) -> None:
    running, go_on = await call_that_waits(served)
    draining = asyncio.create_task(served.calls.drain.drain(grace_s=60))
    error = await refused(served.call())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert not draining.done() and served.calls.drain.active == 1
    served.calls.drain.force_stop()
    await draining
    go_on.set()
    await running
    assert await served.counted("OK") == 1


async def test_draining_ends_with_the_last_call(served: Served) -> None:
    running, go_on = await call_that_waits(served)
    draining = asyncio.create_task(served.calls.drain.drain(grace_s=60))
    go_on.set()
    await asyncio.wait_for(draining, 10)
    await running
    served.calls.open(Tracing("all"))
    assert not served.calls.drain.serving  # a draining server is not opened again
