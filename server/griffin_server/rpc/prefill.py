"""PrefillService: runs prompts for decode servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from griffin.v1 import prefill_pb2 as pb
from griffin.v1 import prefill_pb2_grpc
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import PrefillBegun
from griffin_core.engine.task import MAX_CONCURRENT_PREFILLS
from griffin_core.errors import FingerprintMismatch
from griffin_core.forward.events import (
    LayerExperts,
    LayerKv,
    PrefillFinished,
)
from griffin_server.rpc.messages.prefill_request import prefill_task
from griffin_server.rpc.output_queue import LoopBridge
from griffin_server.rpc.run_prefill import run_prefill
from griffin_server.security.principal import principal_var
from griffin_server.telemetry.audit import audit
from griffin_server.transfer.codec import HandoffWriter
from griffin_server.transfer.negotiation import exporter_for
from griffin_server.transfer.protocol import negotiate
from griffin_server.transfer.shape import handoff_shape

MAX_EXPORTS = 2 * MAX_CONCURRENT_PREFILLS
"""The most calls at once whose KV is computed or exported in this server's GPU memory, which no
reservation covers."""

HOLD_TIME_S = 10.0
"""Seconds that exported KV is kept for the decode server to copy it and end the call."""


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """One stream is one handoff: when the stream ends, for any reason, so does the work.

    Args:
        bridge: delivers the engine's events to the loop that serves calls.
        handoff_directory: see ``exporter_for``.
    """

    def __init__(self, engine: Engine, bridge: LoopBridge, handoff_directory: Path | None) -> None:
        self._engine = engine
        self._bridge = bridge
        self._handoff_directory = handoff_directory
        self._exports = asyncio.Semaphore(MAX_EXPORTS)

    async def Prefill(
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.PrefillResponse]:
        model = self._engine.model
        version = negotiate(request)
        if request.model_fingerprint != model.fingerprint:
            raise FingerprintMismatch(
                f"model_fingerprint: got {request.model_fingerprint[:80]!r}; this server holds "
                f"{model.name} with fingerprint {model.fingerprint}"
            )
        own_digest = model.decoder.calibration_digest
        if request.calibration_digest != own_digest:
            raise FingerprintMismatch(
                f"calibration_digest: got {request.calibration_digest[:80]!r}; this server's "
                f"calibration of {model.name} has {own_digest!r}; give both servers the same file"
            )
        task = prefill_task(request, model.decoder.spec, model.decoder.calibration)
        task = replace(task, owner=principal_var.get().name)
        audit().prompt_tokens = len(task.token_ids)
        shape = handoff_shape(model, task)
        exporter = await asyncio.to_thread(
            exporter_for, request, shape, model.decoder.device, self._handoff_directory
        )
        writer = HandoffWriter(shape, exporter, version)
        yield writer.header()
        async with self._exports if exporter.exports_memory else nullcontext():
            queue_s = 0.0
            run = run_prefill(self._engine, task, self._bridge)
            async with aclosing(run) as events:
                async for event in events:
                    match event:
                        case PrefillBegun():
                            queue_s = event.queue_s
                        case LayerKv():
                            if event.ready is not None:  # waits for the device off the loop
                                await asyncio.to_thread(event.ready.synchronize)
                            for message in writer.kv(event):
                                yield message
                        case LayerExperts():
                            yield writer.experts(event)
                        case PrefillFinished():
                            yield writer.finished(event, queue_s)
                            if exporter.exports_memory:
                                with suppress(asyncio.CancelledError):  # the client ends the call
                                    await asyncio.sleep(HOLD_TIME_S)
