"""Parses requests. Those whose bytes are not a message end with INVALID_ARGUMENT.

gRPC itself would end such a call with UNKNOWN and log a traceback for what a client sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError

from griffin_core.errors import GriffinError, InvalidRequest
from griffin_server.interceptors.call import Call, Context
from griffin_server.rpc.status import abort


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """Stands for a request that cannot be decoded as the type that its method takes.

    Args:
        size: the request's bytes.
        reason: the decoder's message.
    """

    size: int
    reason: str

    def error(self) -> InvalidRequest:
        return InvalidRequest(
            "request",
            f"{self.size} bytes ({self.reason})",
            "a message of the method's request type",
        )


def tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that returns a ``Malformed`` in place of raising."""

    def read(serialized: bytes) -> Any:
        try:
            return deserialize(serialized)
        except DecodeError as error:
            return Malformed(size=len(serialized), reason=str(error))

    return read


@asynccontextmanager
async def parse(call: Call) -> AsyncIterator[None]:
    """Parses the request."""
    call.request = call.parse(call.request)
    yield


@asynccontextmanager
async def refuse_malformed(call: Call) -> AsyncIterator[None]:
    """Refuses a malformed request."""
    if isinstance(call.request, Malformed):
        raise call.request.error()
    yield


Ask: TypeAlias = Callable[[Context], Awaitable[None]]
"""Asks who makes a call of another package, and raises a GriffinError for strangers."""


def checked(behavior: Callable[[Any, Context], Any], ask: Ask) -> Any:
    """A method of another package with one request, which refuses strangers and malformed
    requests."""

    async def unary(request: Any, context: Context) -> Any:
        await _or_abort(ask, context)
        if isinstance(request, Malformed):
            await abort(context, request.error())
        return await behavior(request, context)

    return unary


def checked_stream(behavior: Callable[[Any, Context], AsyncIterator[Any]], ask: Ask) -> Any:
    """A method of another package with many requests, which refuses strangers and malformed
    requests."""

    async def stream(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        await _or_abort(ask, context)

        async def wellformed() -> AsyncIterator[Any]:
            async for request in requests:
                if isinstance(request, Malformed):
                    await abort(context, request.error())
                yield request

        async for response in behavior(wellformed(), context):
            yield response

    return stream


async def _or_abort(ask: Ask, context: Context) -> None:
    try:
        await ask(context)
    except GriffinError as error:
        await abort(context, error)
