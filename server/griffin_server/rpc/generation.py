"""GenerationService: the service that clients call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import (
    Admitted,
    Event,
    Failed,
    Finished,
    Scored,
    Started,
    TokensMade,
)
from griffin_core.engine.task import GenerateTask, PrefillTask, ScoreTask
from griffin_core.errors import EngineFault
from griffin_core.model.generation_config import SamplingDefaults
from griffin_core.spec.model import ModelSpec
from griffin_core.text.tokenizer import Tokenizer
from griffin_server.prefill_pool.source import TurnContexts
from griffin_server.rpc.analysis import analyze
from griffin_server.rpc.messages.model_info import model_info_to_pb
from griffin_server.rpc.messages.prompt_analysis import analyze_task
from griffin_server.rpc.messages.requests import generate_task
from griffin_server.rpc.messages.responses import finished_to_pb, started_to_pb, tokens_to_pb
from griffin_server.rpc.messages.scoring import score_task, scored_to_pb
from griffin_server.rpc.messages.sessions import PageTokens, page_size, session_to_pb
from griffin_server.rpc.output_queue import LoopBridge, OutputQueue
from griffin_server.rpc.text_work import TextWork
from griffin_server.rpc.token_rate import TokenRate
from griffin_server.security.principal import principal_var
from griffin_server.telemetry.audit import audit
from griffin_server.telemetry.context import request_id_var
from griffin_server.telemetry.metrics import Metrics
from griffin_server.telemetry.tracing import spans_var

EVENTS_AHEAD = 64
"""The number of unread events at which a session is paused, because its client does not read."""

Context = grpc.aio.ServicerContext[Any, Any]

R = TypeVar("R", bound=Message)
T = TypeVar("T", GenerateTask, ScoreTask, PrefillTask)


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Turns calls into tasks of the engine, and the engine's events into messages.

    Args:
        contexts: keeps the contexts of calls for work outside them.
        role: "all" or "decode", for GetModelInfo.
        bridge: delivers the engine's events to the loop that serves calls.
        metrics: counts requests.
        sampling_defaults: values of the sampling fields that a request does not set.
        rate: the tokens that callers may have.
    """

    def __init__(
        self,
        engine: Engine,
        contexts: TurnContexts,
        role: str,
        bridge: LoopBridge,
        metrics: Metrics,
        sampling_defaults: SamplingDefaults,
        rate: TokenRate,
    ) -> None:
        self._engine = engine
        self._contexts = contexts
        self._role = role
        self._bridge = bridge
        self._metrics = metrics
        self._sampling_defaults = sampling_defaults
        self._rate = rate
        self._text_work = TextWork(engine.limits.max_queue)
        self._page_tokens = PageTokens()

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        with self._metrics.request(time.monotonic(), context) as counts:
            make = partial(generate_task, sampling_defaults=self._sampling_defaults)
            task = await self._task(make, request, context)
            made = 0
            try:
                async with aclosing(self._events(task)) as events:
                    async for event in events:
                        match event:
                            case Started():
                                audit().session = event.session_id
                                counts.read(event.prompt_tokens)
                                yield started_to_pb(event, request_id_var.get())
                            case TokensMade():
                                made += len(event.ids)
                                counts.made(event)
                                yield tokens_to_pb(event, self._engine.model.tokenizer)
                            case Finished():
                                counts.completed(event)
                                yield finished_to_pb(event)
            finally:
                self._rate.made(task.owner, made)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        with self._metrics.request(time.monotonic(), context) as counts:
            task = await self._task(score_task, request, context)
            async with aclosing(self._events(task)) as events:
                async for event in events:
                    if isinstance(event, Started):
                        counts.read(event.prompt_tokens)
                    elif isinstance(event, Scored):
                        counts.finish_reason = "SCORED"
                        return scored_to_pb(
                            task,
                            event,
                            request_id_var.get(),
                            several=bool(request.continuations),
                        )
            raise EngineFault("scoring ended without a result")

    async def AnalyzePrompt(
        self, request: pb.AnalyzePromptRequest, context: Context
    ) -> AsyncIterator[pb.AnalyzePromptResponse]:
        with self._metrics.request(time.monotonic(), context) as counts:
            make = partial(
                analyze_task,
                base=self._engine.selection,
                calibration=self._engine.model.decoder.calibration,
            )
            task = await self._task(make, request, context)
            messages = analyze(self._engine, task, self._bridge, counts)
            async with aclosing(messages):
                async for message in messages:
                    yield message

    async def _task(
        self,
        make: Callable[[R, Tokenizer, ModelSpec, float | None], T],
        request: R,
        context: Context,
    ) -> T:
        """The task of a request, which is to be submitted at once: it was announced to the engine.
        It is made off the loop, because a long text takes the tokenizer tens of milliseconds."""
        model, arrivals = self._engine.model, self._engine.arrivals
        owner = principal_var.get().name
        arrivals.announce()
        try:
            task = await self._text_work.run(
                partial(
                    make, request, model.tokenizer, model.decoder.spec, context.time_remaining()
                ),
                request.ByteSize(),
                owner,
            )
            await self._rate.admit(owner, _prompt_tokens(task))
        except BaseException:
            arrivals.settle()
            self._engine.wake()  # it may be waiting for this request
            raise
        arrivals.settle()  # nothing runs on the loop between this and the submission
        return replace(task, owner=owner)

    async def _events(self, task: GenerateTask | ScoreTask) -> AsyncGenerator[Event, None]:
        """Runs a task to its end. Closing the iterator ends the task at once, in any phase."""
        queue = OutputQueue[Event](EVENTS_AHEAD, self._engine.wake, self._bridge)
        spans = spans_var.get()
        spans.queued(task.arrived)
        with self._contexts.of_turn(task.turn_id):
            self._engine.submit(task, queue)
            try:
                async for event in queue:
                    spans.take(event)
                    if isinstance(event, Failed):
                        raise event.error
                    if not isinstance(event, Admitted):
                        yield event
                    if isinstance(event, Finished | Scored):
                        return
            finally:
                self._engine.cancel(task.turn_id)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        return model_info_to_pb(self._engine, self._role, self._sampling_defaults)

    async def GetSession(
        self, request: pb.GetSessionRequest, context: Context
    ) -> pb.GetSessionResponse:
        info = await asyncio.wrap_future(self._engine.session(request.session_id, owner=_sees()))
        return pb.GetSessionResponse(session=session_to_pb(info))

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        after, most = self._page_tokens.read(request.page_token), page_size(request)
        page = await asyncio.wrap_future(
            self._engine.session_page(after=after, most=most, owner=_sees())
        )
        return pb.ListSessionsResponse(
            sessions=[session_to_pb(info) for info in page.sessions],
            next_page_token=self._page_tokens.write(page.last),
            total_size=page.total,
        )

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        await asyncio.wrap_future(self._engine.close(request.session_id, owner=_sees()))
        return pb.CloseSessionResponse()


def _prompt_tokens(task: GenerateTask | ScoreTask | PrefillTask) -> int:
    """How many tokens of a task are read."""
    if isinstance(task, PrefillTask):
        return len(task.token_ids)
    return task.run_tokens if isinstance(task, ScoreTask) else len(task.prompt)


def _sees() -> str | None:
    """Whose sessions the caller sees; None for everybody's."""
    return principal_var.get().sees
