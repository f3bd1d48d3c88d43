"""Decode's way to its prefill servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc
import structlog
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from griffin.v1 import prefill_pb2 as pb
from griffin.v1 import prefill_pb2_grpc
from griffin_core.engine.prefill_queue import PrefillTask
from griffin_core.errors import (
    CapacityExhausted,
    DeadlinePassed,
    EngineFault,
    FingerprintMismatch,
    GriffinError,
    HandoffBroken,
    HandoffError,
    PrefillUnavailable,
)
from griffin_core.forward.prefill import PrefillEvent, PrefillRestarted
from griffin_core.model.load import Model
from griffin_server.generation.convert import policy_to_pb
from griffin_server.handoff.convert import HandoffReader
from griffin_server.handoff.cuda_memory import can_share
from griffin_server.handoff.shape import HandoffShape, handoff_shape
from griffin_server.handoff.shared_memory import DATA_START, Segment, SegmentPool
from griffin_server.handoff.transports import (
    ChunkReader,
    CudaReader,
    KvReader,
    MemoryNotShared,
    SharedMemoryReader,
)
from griffin_server.ops.connections import PREFILL_CHANNEL_OPTIONS
from griffin_server.ops.interceptors import REQUEST_ID_KEY, request_id_var
from griffin_server.ops.metrics import Metrics
from griffin_server.ops.settings import HandoffWay
from griffin_server.ops.status import details_of
from griffin_server.ops.tracing import Metadata, spans_var

log = structlog.get_logger("griffin.prefill")

CONNECT_S = 2.0
"""How long a call waits for a prefill server that is not connected."""

PROBE_S = 0.5
"""Between two health checks of a server that was set aside, and how long each may take."""

MISMATCH_S = 60.0
"""For how long a server that holds another model is left alone."""

PREFILL_SERVICE = pb.DESCRIPTOR.services_by_name["PrefillService"].full_name


class PrefillServers:
    """Several prefill servers as one: each prompt goes to the one with the fewest tokens to run.

    A server that fails is set aside until a health check finds it serving again. The prompt it
    failed gets one more try on another, if there is one and time is left.

    Args:
        servers: at least one.
    """

    def __init__(self, servers: Sequence[PrefillServer]) -> None:
        self._servers = tuple(servers)
        self._probes: set[asyncio.Task[None]] = set()

    @property
    def servers(self) -> tuple[PrefillServer, ...]:
        """The servers that it chooses from."""
        return self._servers

    async def stream(
        self, task: PrefillTask, timeout_s: float | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        """The events of a prefill, PrefillFinished last and verified. PrefillRestarted says that
        those before it do not count. Closing the iterator ends the work behind it.

        Raises:
            GriffinError: it did not come to its end.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        server = self._choose(self._servers)
        try:
            async with aclosing(server.stream(task, timeout_s)) as events:
                async for event in events:
                    yield event
            return
        except (HandoffError, EngineFault, CapacityExhausted) as error:
            self._note_failure(server, error)
            others = [other for other in self._servers if other is not server]
            left_s = None if deadline is None else deadline - time.monotonic()
            if not others or (left_s is not None and left_s <= 0):
                raise
            log.warning("prefill retried", failed=server.target, error=str(error))
        yield PrefillRestarted()
        server = self._choose(others)
        try:
            async with aclosing(server.stream(task, left_s)) as events:
                async for event in events:
                    yield event
        except (HandoffError, EngineFault) as error:
            self._note_failure(server, error)
            raise

    async def close(self) -> None:
        """Frees what the servers' connections hold."""
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self._servers))

    @staticmethod
    def _choose(servers: Sequence[PrefillServer]) -> PrefillServer:
        """The least busy of those that answer; if none does, of all."""
        serving = [server for server in servers if not server.set_aside]
        return min(serving or servers, key=lambda server: server.outstanding_tokens)

    def _note_failure(self, server: PrefillServer, error: GriffinError) -> None:
        """Sets a server aside, unless it was only full."""
        if isinstance(error, CapacityExhausted) or server.set_aside:
            return
        server.set_aside = True
        # One that holds another model says SERVING, too.
        rest_s = MISMATCH_S if isinstance(error, FingerprintMismatch) else 0.0
        probe = asyncio.create_task(server.wait_until_serving(rest_s))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)


class PrefillServer:
    """One prefill server, and the connection to it.

    Args:
        target: its gRPC name: host:port, or dns:///name for all addresses of a name, in turn.
        model: this side's; the other must hold the same.
        metrics: where handoffs are counted.
        handoff: how the KV may come; see ``Settings``.
    """

    def __init__(
        self,
        target: str,
        model: Model,
        metrics: Metrics,
        handoff: HandoffWay = "auto",
    ) -> None:
        self.target = target
        self.outstanding_tokens = 0
        """Of the prompts it is running."""
        self.set_aside = False
        """Whether it failed and has not been found serving since."""
        self._model = model
        self._channel = grpc.aio.insecure_channel(target, options=PREFILL_CHANNEL_OPTIONS)
        self._stub = prefill_pb2_grpc.PrefillServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._pool = SegmentPool()
        self._abandoned: set[asyncio.Future[Segment | None]] = set()
        self._device = model.decoder.device
        self._metrics = metrics
        self._ways: set[pb.Transport.ValueType] = set()
        if handoff != "messages":
            self._ways.add(pb.TRANSPORT_SHARED_MEMORY)
        if handoff == "auto" and can_share(self._device):
            self._ways.add(pb.TRANSPORT_CUDA_MEMORY)

    async def stream(
        self, task: PrefillTask, timeout_s: float | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        """See ``PrefillServers.stream``; without a second try."""
        self.outstanding_tokens += len(task.token_ids)
        try:
            with spans_var.get().handoff(self.target) as trace:
                async with aclosing(self._stream(task, timeout_s, trace)) as events:
                    async for event in events:
                        yield event
        finally:
            self.outstanding_tokens -= len(task.token_ids)

    async def _stream(
        self, task: PrefillTask, timeout_s: float | None, trace: Metadata
    ) -> AsyncGenerator[PrefillEvent, None]:
        clock = time.monotonic()
        shape = handoff_shape(self._model, task)
        await self._connect()
        left_s = timeout_s
        while True:
            try:
                async with aclosing(self._call(task, shape, left_s, trace)) as events:
                    async for event in events:
                        yield event
                return
            except MemoryNotShared as error:  # and its way is not offered again
                log.warning("a way of the KV is given up", target=self.target, error=str(error))
            yield PrefillRestarted()
            if timeout_s is not None:
                left_s = max(0.0, timeout_s - (time.monotonic() - clock))

    async def _call(
        self, task: PrefillTask, shape: HandoffShape, timeout_s: float | None, trace: Metadata
    ) -> AsyncGenerator[PrefillEvent, None]:
        clock = time.monotonic()
        way = await self._way(shape)
        reader = HandoffReader(shape, way, ChunkReader(shape, self._device))
        call: Any = None
        try:
            request = _request(task, shape)
            way.offer(request)
            metadata = ((REQUEST_ID_KEY, request_id_var.get()), *trace)
            call = self._stub.Prefill(request, timeout=timeout_s, metadata=metadata)
            async for message in call:
                if (event := reader.read(message)) is not None:
                    yield event
                if reader.finished:  # how the call ends is no matter any more
                    self._metrics.handed_over(shape, reader.transport, time.monotonic() - clock)
                    return
            raise HandoffBroken(f"handoff: {self.target} ended the stream before its end")
        except grpc.aio.AioRpcError as error:
            raise _to_error(self.target, error) from error
        except MemoryNotShared:
            self._give_up(way)
            raise
        finally:
            way.close(whole=reader.finished)  # before the other side may free what it lends
            if call is not None:
                call.cancel()
            if reader.declined:  # another host, or another kind of device
                self._give_up(way)

    async def close(self) -> None:
        """Closes the connection and removes segments."""
        await asyncio.gather(*self._abandoned)
        self._pool.close()
        await self._channel.close()

    async def wait_until_serving(self, rest_s: float) -> None:
        """Asks its health service, after a rest, until it says SERVING."""
        await asyncio.sleep(rest_s)
        request = health_pb2.HealthCheckRequest(service=PREFILL_SERVICE)
        while self.set_aside:
            try:
                response = await self._health.Check(request, timeout=PROBE_S)
                self.set_aside = response.status != health_pb2.HealthCheckResponse.SERVING
            except grpc.aio.AioRpcError:
                pass
            if self.set_aside:
                await asyncio.sleep(PROBE_S)
        log.info("prefill server serves again", target=self.target)

    async def _connect(self) -> None:
        try:
            await asyncio.wait_for(self._channel.channel_ready(), CONNECT_S)
        except TimeoutError:
            raise PrefillUnavailable(
                f"prefill: no server answers at {self.target} (waited {CONNECT_S:g} s)"
            ) from None

    async def _way(self, shape: HandoffShape) -> KvReader:
        """How to offer to take the KV: the best way that was not found closed."""
        if pb.TRANSPORT_CUDA_MEMORY in self._ways:
            return CudaReader(shape, self._device)
        if pb.TRANSPORT_SHARED_MEMORY in self._ways:
            segment = await self._segment(DATA_START + shape.kv_bytes)
            if segment is not None:
                return SharedMemoryReader(shape, self._device, segment, self._pool)
        return ChunkReader(shape, self._device)

    def _give_up(self, way: KvReader) -> None:
        self._ways.discard(way.transport)

    async def _segment(self, size: int) -> Segment | None:
        # Taking fresh memory costs a millisecond for each MB or so.
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


def _request(task: PrefillTask, shape: HandoffShape) -> pb.PrefillRequest:
    return pb.PrefillRequest(
        model_fingerprint=shape.fingerprint,
        token_ids=task.token_ids,
        density=task.selection.density,
        policy=policy_to_pb(task.selection.policy),
        seed=task.selection.seed,
    )


def _to_error(target: str, error: grpc.aio.AioRpcError) -> GriffinError:
    """What a failed call means to the request that waits for it."""
    words = f"prefill server {target}: {error.details()}"
    match error.code():
        case grpc.StatusCode.FAILED_PRECONDITION:
            return FingerprintMismatch(words)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return CapacityExhausted(words, retry_after_s=_retry_after_s(error) or 1.0)
        case grpc.StatusCode.DEADLINE_EXCEEDED:  # the client's; no fault of the server
            return DeadlinePassed(words)
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
