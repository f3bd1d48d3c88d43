"""PrefillService: runs prompts for Decode servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, nullcontext, suppress
from typing import Any

import grpc

from griffin.v1 import prefill_pb2 as pb
from griffin.v1 import prefill_pb2_grpc
from griffin_core.decode.task import check_token_ids
from griffin_core.engine import Engine
from griffin_core.errors import FingerprintMismatch, InvalidRequest
from griffin_core.experts.selection import Selection
from griffin_core.model.spec import ModelSpec
from griffin_core.prefill import LayerExperts, LayerKv, PrefillFinished
from griffin_core.prefill_queue import MAX_BEGUN_PREFILLS, PrefillBegun, PrefillTask
from griffin_server.rpc.messages.requests import policy_from_pb
from griffin_server.rpc.output_queue import Mail
from griffin_server.rpc.run_prefill import run_prefill
from griffin_server.transfer.base import writer_for
from griffin_server.transfer.codec import HandoffWriter
from griffin_server.transfer.shape import handoff_shape

MAX_LENDINGS = 2 * MAX_BEGUN_PREFILLS
"""Calls whose KV may lie in this server's GPU memory, being made or being copied: no reservation
covers it."""

LENT_S = 10.0
"""How long a reader has to copy what it was lent and to end the call."""


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """One stream a handoff; when the stream ends, for whatever reason, so does the work."""

    def __init__(self, engine: Engine, mail: Mail) -> None:
        self._engine = engine
        self._mail = mail
        self._lendings = asyncio.Semaphore(MAX_LENDINGS)

    async def Prefill(
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.PrefillResponse]:
        model = self._engine.model
        if request.model_fingerprint != model.fingerprint:
            raise FingerprintMismatch(
                f"model_fingerprint: got {request.model_fingerprint[:80]!r}; this server holds "
                f"{model.name} with fingerprint {model.fingerprint}"
            )
        task = _task(request, model.decoder.spec)
        shape = handoff_shape(model, task)
        way = writer_for(request, shape, model.decoder.device)
        writer = HandoffWriter(shape, way)
        yield writer.header()
        async with self._lendings if way.lends else nullcontext():
            queue_s = 0.0
            run = run_prefill(self._engine, task, self._mail)
            async with aclosing(run) as events:
                async for event in events:
                    match event:
                        case PrefillBegun():
                            queue_s = event.queue_s
                        case LayerKv():
                            if event.ready is not None:  # the loop is not to wait for the device
                                await asyncio.to_thread(event.ready.synchronize)
                            for message in writer.kv(event):
                                yield message
                        case LayerExperts():
                            yield writer.experts(event)
                        case PrefillFinished():
                            yield writer.finished(event, queue_s)
                            if way.lends:
                                with suppress(asyncio.CancelledError):  # the reader's goodbye
                                    await asyncio.sleep(LENT_S)


def _task(request: pb.PrefillRequest, spec: ModelSpec) -> PrefillTask:
    if not 1 <= len(request.token_ids) <= spec.context_length:
        raise InvalidRequest(
            "token_ids", f"{len(request.token_ids)} tokens", f"1 to {spec.context_length} tokens"
        )
    check_token_ids("token_ids", request.token_ids, spec)
    if not 0 < request.density <= 1:
        raise InvalidRequest("density", request.density, "(0, 1]")
    policy = policy_from_pb("policy", request.policy)
    return PrefillTask(
        token_ids=tuple(request.token_ids),
        selection=Selection(density=request.density, policy=policy or "topk", seed=request.seed),
    )
