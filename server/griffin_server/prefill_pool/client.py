"""One prefill server and the channel to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
import structlog

from griffin.v1 import prefill_pb2 as pb
from griffin.v1 import prefill_pb2_grpc
from griffin_core.engine.task import PrefillTask
from griffin_core.errors import HandoffBroken, PrefillUnavailable
from griffin_core.forward.events import (
    PrefillEvent,
    PrefillRestarted,
)
from griffin_core.model.load import Model
from griffin_server.prefill_pool.call_errors import error_of
from griffin_server.prefill_pool.channel import PrefillChannel
from griffin_server.prefill_pool.health import ServerHealth
from griffin_server.rpc.messages.prefill_request import prefill_request
from griffin_server.security.files import WatchedFiles
from griffin_server.settings import HandoffTransports
from griffin_server.telemetry.context import REQUEST_ID_KEY, request_id_var
from griffin_server.telemetry.metrics import Metrics
from griffin_server.telemetry.tracing import Metadata, spans_var
from griffin_server.transfer.base import MemoryNotShared
from griffin_server.transfer.codec import HandoffReader
from griffin_server.transfer.descriptors import DescriptorSocket
from griffin_server.transfer.negotiation import TransportOffers
from griffin_server.transfer.protocol import NEWEST, OLDEST
from griffin_server.transfer.shape import HandoffShape, handoff_shape

log = structlog.get_logger("griffin.prefill")

CONNECT_S = 2.0
"""Seconds that a call waits for the channel to connect."""


class PrefillClient:
    """Pulls prefills from one server.

    Args:
        target: the server's gRPC name: host:port, or dns:///name for all addresses of a name by
            turns.
        model: this server's model; the prefill server must hold the same one.
        metrics: counts the handoffs.
        handoff: the transports that the KV may use; see ``Settings``.
        handoff_timeout_s: the longest between two messages; see ``Settings``.
        descriptors: gives shared memory to the server; None does without it.
        credentials: of the channel; None does without TLS.
    """

    def __init__(
        self,
        target: str,
        model: Model,
        metrics: Metrics,
        handoff: HandoffTransports = "auto",
        handoff_timeout_s: float = 120.0,
        descriptors: DescriptorSocket | None = None,
        credentials: WatchedFiles[grpc.ChannelCredentials] | None = None,
    ) -> None:
        self.target = target
        self.outstanding_tokens = 0
        """Tokens of the prompts that the server is running for this client."""
        self._model = model
        self._metrics = metrics
        self._channel = PrefillChannel(target, credentials)
        self.health = ServerHealth(target, self._channel)
        self._handoff_timeout_s = handoff_timeout_s
        self._offers = TransportOffers(model.decoder.device, handoff, descriptors)

    async def stream(
        self, task: PrefillTask, timeout_s: float | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        """The events of a prefill, PrefillFinished last and verified. Closing the iterator ends the
        call.

        Raises:
            GriffinError: the prefill did not finish.
        """
        self.outstanding_tokens += len(task.token_ids)
        try:
            with spans_var.get().handoff(self.target) as trace:
                async with aclosing(self._stream(task, timeout_s, trace)) as events:
                    async for event in events:
                        yield event
        finally:
            self.outstanding_tokens -= len(task.token_ids)

    async def close(self) -> None:
        """Closes the channel and frees what it holds."""
        await self.health.close()
        await self._offers.close()
        await self._channel.close()

    async def _stream(
        self, task: PrefillTask, timeout_s: float | None, trace: Metadata
    ) -> AsyncGenerator[PrefillEvent, None]:
        """Calls once, and again with the next transport each time one turns out not to work."""
        clock = time.monotonic()
        shape = handoff_shape(self._model, task)
        channel = await self._connected()
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        left_s = timeout_s
        while True:
            try:
                async with aclosing(self._call(stub, task, shape, left_s, trace)) as events:
                    async for event in events:
                        yield event
                return
            except MemoryNotShared as error:  # the failed transport has been withdrawn
                log.warning("handoff transport withdrawn", target=self.target, error=str(error))
            yield PrefillRestarted()
            if timeout_s is not None:
                left_s = max(0.0, timeout_s - (time.monotonic() - clock))

    async def _call(
        self,
        stub: Any,
        task: PrefillTask,
        shape: HandoffShape,
        timeout_s: float | None,
        trace: Metadata,
    ) -> AsyncGenerator[PrefillEvent, None]:
        clock = time.monotonic()
        importer = await self._offers.importer(shape)
        reader = HandoffReader(shape, importer, self._offers.fallback(shape))
        call: Any = None
        try:
            digest = self._model.decoder.calibration_digest
            request = prefill_request(task, shape.fingerprint, digest, (OLDEST, NEWEST))
            importer.offer(request)
            metadata = ((REQUEST_ID_KEY, request_id_var.get()), *trace)
            call = stub.Prefill(request, timeout=timeout_s, metadata=metadata)
            async for message in self._in_time(call):
                if (event := reader.read(message)) is not None:
                    yield event
                if reader.finished:  # the call's final status is ignored
                    self._metrics.handed_over(shape, reader.transport, time.monotonic() - clock)
                    return
            raise HandoffBroken(f"handoff: {self.target} ended the stream before its end")
        except grpc.aio.AioRpcError as error:
            raise error_of(self.target, error) from error
        except MemoryNotShared:
            self._offers.withdraw(importer.transport)
            raise
        finally:
            try:
                # Before the call is cancelled, since the server may then free what it exports.
                importer.close(complete=reader.finished)
            finally:
                if call is not None:
                    call.cancel()
            if reader.declined:  # by a server on another host or with another kind of device
                self._offers.withdraw(importer.transport)

    async def _in_time(self, call: Any) -> AsyncGenerator[pb.PrefillResponse, None]:
        """The messages of a call.

        Raises:
            HandoffBroken: one of them does not come in time, or is none.
        """
        messages = aiter(call)
        while True:
            try:
                async with asyncio.timeout(self._handoff_timeout_s):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise HandoffBroken(
                    f"handoff: {self.target} has sent nothing for {self._handoff_timeout_s:g} s"
                ) from None
            if message is None:  # what gRPC gives for bytes that it cannot parse
                raise HandoffBroken(f"handoff: {self.target} sent bytes that are no message")
            yield message

    async def _connected(self) -> grpc.aio.Channel:
        channel = self._channel.current
        try:
            await asyncio.wait_for(channel.channel_ready(), CONNECT_S)
        except TimeoutError:
            raise PrefillUnavailable(
                f"prefill: no server answers at {self.target} (waited {CONNECT_S:g} s)"
            ) from None
        return channel
