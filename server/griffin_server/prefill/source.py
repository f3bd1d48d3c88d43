"""Decode's way to a prefill: in this process or on another server, through one interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import grpc
from google.rpc.error_details_pb2 import RetryInfo

from griffin.v1 import prefill_pb2 as pb
from griffin.v1 import prefill_pb2_grpc
from griffin_core.decode.events import Failed
from griffin_core.engine import Engine, PrefillBegun, PrefillStreamEvent, PrefillTask
from griffin_core.errors import (
    CapacityExhausted,
    EngineFault,
    FingerprintMismatch,
    GriffinError,
    HandoffBroken,
    PrefillUnavailable,
)
from griffin_core.model.load import Model
from griffin_core.prefill import PrefillEvent, PrefillFinished
from griffin_server.channel import Channel
from griffin_server.generation.convert import policy_to_pb
from griffin_server.handoff.convert import HandoffReader, HandoffShape, handoff_shape
from griffin_server.handoff.shared_memory import DATA_START, Segment, SegmentPool
from griffin_server.ops.interceptors import REQUEST_ID_KEY, request_id_var
from griffin_server.ops.status import details_of
from griffin_server.prefill.service import EVENTS_AHEAD

CONNECT_S = 2.0
"""How long a call waits for a prefill server that is not connected."""

CHANNEL_OPTIONS = [
    # A single token's KV in one layer may be larger than a chunk; nothing comes near this.
    ("grpc.max_receive_message_length", 64 << 20),
    # A restarted prefill server is found again within CONNECT_S.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]


class PrefillSource(Protocol):
    """Something that runs prompts."""

    def stream(
        self, task: PrefillTask, timeout_s: float | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        """The events of a prefill, PrefillFinished last and verified. Closing the iterator ends the
        work behind it.

        Raises:
            GriffinError: it did not come to its end.
        """
        ...

    async def close(self) -> None:
        """Frees what the source holds."""
        ...


class LocalPrefill:
    """Prefill by an engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def stream(
        self, task: PrefillTask, timeout_s: float | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        channel: Channel[PrefillStreamEvent] = Channel(EVENTS_AHEAD, self._engine.wake)
        run = self._engine.prefill(task, channel, admitted=True)
        try:
            async for event in channel:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, PrefillBegun):
                    continue
                yield event
                if isinstance(event, PrefillFinished):
                    return
        finally:
            run.cancel()
            self._engine.wake()

    async def close(self) -> None:
        """Holds nothing."""


class RemotePrefill:
    """Prefill by another server.

    Args:
        target: its gRPC name, host:port say.
        model: this side's; the other must hold the same.
        shared_memory: whether to offer a segment for the KV.
    """

    def __init__(self, target: str, model: Model, *, shared_memory: bool) -> None:
        self._target = target
        self._model = model
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = prefill_pb2_grpc.PrefillServiceStub(self._channel)
        self._pool = SegmentPool()
        self._abandoned: set[asyncio.Future[Segment | None]] = set()
        self._offers_segments = shared_memory

    async def stream(
        self, task: PrefillTask, timeout_s: float | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        shape = handoff_shape(self._model, task)
        await self._connect()
        segment = await self._segment(shape)
        reader = HandoffReader(shape, segment)
        call: Any = None
        try:
            call = self._stub.Prefill(
                _request(task, shape, segment, reader.nonce),
                timeout=timeout_s,
                metadata=((REQUEST_ID_KEY, request_id_var.get()),),
            )
            async for message in call:
                if (event := reader.read(message)) is not None:
                    yield event
            if not reader.finished:
                raise HandoffBroken(f"handoff: {self._target} ended the stream before its end")
        except grpc.aio.AioRpcError as error:
            raise _to_error(self._target, error) from error
        finally:
            if call is not None:
                call.cancel()
            if reader.segment_refused:  # another host: do not offer again
                self._offers_segments = False
            self._release(segment, reader)

    async def close(self) -> None:
        """Closes the connection and removes segments."""
        await asyncio.gather(*self._abandoned)
        self._pool.close()
        await self._channel.close()

    async def _connect(self) -> None:
        try:
            await asyncio.wait_for(self._channel.channel_ready(), CONNECT_S)
        except TimeoutError:
            raise PrefillUnavailable(
                f"prefill: no server answers at {self._target} (waited {CONNECT_S:g} s)"
            ) from None

    async def _segment(self, shape: HandoffShape) -> Segment | None:
        if not self._offers_segments:
            return None
        # Taking fresh memory costs a millisecond for each MB or so.
        size = DATA_START + shape.kv_bytes
        taking = asyncio.ensure_future(asyncio.to_thread(self._pool.take, size))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:  # the thread goes on: what it takes must come back
            self._abandoned.add(taking)
            taking.add_done_callback(self._take_back)
            raise

    def _take_back(self, taking: asyncio.Future[Segment | None]) -> None:
        self._abandoned.discard(taking)
        if (segment := taking.result()) is not None:
            self._pool.give_back(segment)

    def _release(self, segment: Segment | None, reader: HandoffReader) -> None:
        if segment is None:
            return
        if reader.finished:
            self._pool.give_back(segment)
        else:  # the other side may still be writing
            segment.unlink()


def _request(
    task: PrefillTask, shape: HandoffShape, segment: Segment | None, nonce: bytes
) -> pb.PrefillRequest:
    request = pb.PrefillRequest(
        model_fingerprint=shape.fingerprint,
        token_ids=task.token_ids,
        density=task.selection.density,
        policy=policy_to_pb(task.selection.policy),
        seed=task.selection.seed,
    )
    if segment is not None:
        request.shared_memory.name = segment.name
        request.shared_memory.size_bytes = segment.size_bytes
        request.shared_memory.nonce = nonce
    return request


def _to_error(target: str, error: grpc.aio.AioRpcError) -> GriffinError:
    """What a failed call means to the request that waits for it."""
    words = f"prefill server {target}: {error.details()}"
    match error.code():
        case grpc.StatusCode.FAILED_PRECONDITION:
            return FingerprintMismatch(words)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return CapacityExhausted(words, retry_after_s=_retry_after_s(error) or 1.0)
        case (
            grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.INTERNAL
            | grpc.StatusCode.UNIMPLEMENTED  # not a prefill server at all
        ):
            return EngineFault(words)
        case _:
            return HandoffBroken(words)


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    status = details_of(tuple(error.trailing_metadata() or ()))
    info = RetryInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds() / 1000)
    return None
