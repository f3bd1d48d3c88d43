"""Parses requests. Those whose bytes are not a message end with INVALID_ARGUMENT.

gRPC itself would end such a call with UNKNOWN and log a traceback for what a client sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError

from griffin_core.errors import CapacityExhausted, GriffinError, InvalidRequest
from griffin_server.interceptors.call import Call, Context
from griffin_server.interceptors.wire import least_counts
from griffin_server.rpc.status import abort

QUICKLY_PARSED = 64 << 10
"""The bytes of a request that takes the event loop less than 2 ms to parse. Only larger ones are
looked at before."""

MOST_OF_OTHERS = 64 << 10
"""The most bytes of a request of health or reflection."""


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


class Parser:
    """Parses requests of up to ``most`` bytes."""

    def __init__(self) -> None:
        self.most: int | None = None
        """The most bytes of a request; None for as many as gRPC receives."""
        self.most_numbers: int | None = None
        """The most numbers of a list of token ids; None for any."""

    @asynccontextmanager
    async def parse(self, call: Call) -> AsyncIterator[None]:
        """Parses the request.

        Raises:
            CapacityExhausted: it is too large, and was not parsed.
            InvalidRequest: it has more token ids than the model's context, and was not parsed.
        """
        size = len(call.request)
        if self.most is not None and size > self.most:
            raise CapacityExhausted(
                f"request: got {size} bytes; allowed: at most {self.most} (--max-request-bytes)",
                retry_after_s=None,
            )
        if self.most_numbers is not None and size > QUICKLY_PARSED:
            for number, least in least_counts(call.request):
                if least > self.most_numbers and number in call.number_fields:
                    raise InvalidRequest(
                        call.number_fields[number],
                        f"more than {least} tokens",
                        f"at most {self.most_numbers}, the context length",
                    )
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


def checked(
    behavior: Callable[[Any, Context], Any], decode: Callable[[bytes], Any], ask: Ask
) -> Any:
    """A method of another package with one request, which refuses strangers and malformed
    requests."""

    async def unary(request: bytes, context: Context) -> Any:
        await _or_abort(ask, context)
        return await behavior(await _decoded(request, decode, context), context)

    return unary


def checked_stream(
    behavior: Callable[[Any, Context], AsyncIterator[Any]],
    decode: Callable[[bytes], Any],
    ask: Ask,
) -> Any:
    """A method of another package with many requests, which refuses strangers and malformed
    requests."""

    async def stream(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        await _or_abort(ask, context)

        async def wellformed() -> AsyncIterator[Any]:
            async for request in requests:
                yield await _decoded(request, decode, context)

        async for response in behavior(wellformed(), context):
            yield response

    return stream


async def _or_abort(ask: Ask, context: Context) -> None:
    try:
        await ask(context)
    except GriffinError as error:
        await abort(context, error)


async def _decoded(request: bytes, decode: Callable[[bytes], Any], context: Context) -> Any:
    """A message of health or reflection, which is never large."""
    if len(request) > MOST_OF_OTHERS:
        message = f"request: got {len(request)} bytes; allowed: at most {MOST_OF_OTHERS}"
        await abort(context, CapacityExhausted(message, retry_after_s=None))
    decoded = decode(request)
    if isinstance(decoded, Malformed):
        await abort(context, decoded.error())
    return decoded
