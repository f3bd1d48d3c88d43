"""GenerationService: what clients call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

import grpc

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
from griffin_core.engine.prefill_queue import PrefillBegun, PrefillTask
from griffin_core.engine.task import GenerateTask, ScoreTask
from griffin_core.errors import CapacityExhausted, EngineFault, GriffinError
from griffin_core.forward.prefill import LayerActivations, LayerExperts
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.generation_config import NO_SAMPLING_DEFAULTS, SamplingDefaults
from griffin_core.spec.model import ModelSpec
from griffin_core.text.tokenizer import Tokenizer
from griffin_server import __version__
from griffin_server.channel import Channel, Mail
from griffin_server.generation import analysis, convert
from griffin_server.ops.interceptors import request_id_var
from griffin_server.ops.metrics import Metrics
from griffin_server.ops.tracing import spans_var
from griffin_server.prefill.run import run_prefill
from griffin_server.prefill.source import PrefillServers

TOKENS_AHEAD = 64
"""Events that may wait for a client that does not read before its session is paused."""

TOKENIZER_THREADS = 2
"""Prompts that are tokenized at once."""

Context = grpc.aio.ServicerContext[Any, Any]

R = TypeVar("R")
T = TypeVar("T")


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Turns calls into the engine's tasks and pulls their prefills.

    Args:
        prefill: where prompts are run that the engine does not run itself; None if there are none.
        role: "all" or "decode", for GetModelInfo.
        mail: what brings the engine's events here.
        metrics: where requests are counted.
        sampling_defaults: values of the sampling fields that a request does not set.
    """

    def __init__(
        self,
        engine: Engine,
        prefill: PrefillServers | None,
        role: str,
        mail: Mail,
        metrics: Metrics,
        sampling_defaults: SamplingDefaults = NO_SAMPLING_DEFAULTS,
    ) -> None:
        self._engine = engine
        self._model = engine.model
        self._prefill = prefill
        self._role = role
        self._mail = mail
        self._metrics = metrics
        self._sampling_defaults = sampling_defaults
        # Threads of its own: whoever else waits for one does not wait for long texts.
        self._tokenizing = ThreadPoolExecutor(TOKENIZER_THREADS, "griffin-tokenize")
        self._page_tokens = convert.PageTokens()

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        with self._metrics.request(time.monotonic(), context) as counted:
            make = partial(convert.generate_task, sampling_defaults=self._sampling_defaults)
            task = await self._task(make, request, context)
            async with aclosing(self._events(task, context)) as events:
                async for event in events:
                    match event:
                        case Started():
                            counted.read(event.prompt_tokens)
                            yield convert.started_to_pb(event, request_id_var.get())
                        case TokensMade():
                            counted.made(event)
                            yield convert.tokens_to_pb(event, self._model.tokenizer)
                        case Finished():
                            counted.completed(event)
                            yield convert.finished_to_pb(event)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        with self._metrics.request(time.monotonic(), context) as counted:
            task = await self._task(convert.score_task, request, context)
            async with aclosing(self._events(task, context)) as events:
                async for event in events:
                    if isinstance(event, Started):
                        counted.read(event.prompt_tokens)
                    elif isinstance(event, Scored):
                        counted.finish_reason = "SCORED"
                        return convert.scored_to_pb(
                            task,
                            event,
                            request_id_var.get(),
                            several=bool(request.continuations),
                        )
            raise EngineFault("scoring ended without a result")

    async def AnalyzePrompt(
        self, request: pb.AnalyzePromptRequest, context: Context
    ) -> AsyncIterator[pb.AnalyzePromptResponse]:
        model = self._model
        with self._metrics.request(time.monotonic(), context) as counted:
            make = partial(analysis.analyze_task, base=self._engine.selection)
            task = await self._task(make, request, context)
            spec = model.decoder.spec
            needs = kv_bytes(spec, model.decoder.dtype, len(task.token_ids))
            if needs > (allowed := self._engine.session_bytes):
                raise CapacityExhausted(
                    f"memory: the prompt needs {needs} bytes of KV cache; the server allows "
                    f"{allowed} in all. Give fewer tokens",
                    retry_after_s=None,
                )
            async with aclosing(run_prefill(self._engine, task, self._mail)) as events:
                # Off the loop: thousands of tokens are decoded one by one, a GPU is waited for.
                async for event in events:
                    match event:
                        case PrefillBegun():
                            counted.read(len(task.token_ids))
                            yield await asyncio.to_thread(
                                analysis.started_to_pb,
                                task,
                                model.tokenizer,
                                spec,
                                request_id_var.get(),
                            )
                        case LayerActivations() | LayerExperts():
                            for message in await asyncio.to_thread(analysis.event_to_pb, event):
                                yield message
            counted.finish_reason = "ANALYZED"

    async def _task(
        self,
        make: Callable[[R, Tokenizer, ModelSpec, float | None], T],
        request: R,
        context: Context,
    ) -> T:
        """The task of a request, off the loop: a long text takes the tokenizer tens of
        milliseconds."""
        model = self._model
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizing,
            make,
            request,
            model.tokenizer,
            model.decoder.spec,
            context.time_remaining(),
        )

    async def _events(
        self, task: GenerateTask | ScoreTask, context: Context
    ) -> AsyncGenerator[Event, None]:
        """Runs a task to its end. Closing the iterator ends it at once, wherever it is."""
        channel: Channel[Event] = Channel(TOKENS_AHEAD, self._engine.wake, self._mail)
        spans = spans_var.get()
        spans.queued(task.arrived)
        turn_id = self._engine.submit(task, channel)
        handoff: asyncio.Task[None] | None = None
        try:
            async for event in channel:
                spans.take(event)
                match event:
                    case Failed():
                        raise event.error
                    case Admitted(handoff=selection) if selection is not None:
                        prefill = PrefillTask(token_ids=task.prefilled, selection=selection)
                        handoff = asyncio.create_task(self._pull(turn_id, prefill, context))
                    case Admitted():
                        pass
                    case _:
                        yield event
                if isinstance(event, Finished | Scored):
                    return
        finally:
            self._engine.cancel(turn_id)
            if handoff is not None:
                handoff.cancel()
                with suppress(asyncio.CancelledError):
                    await handoff

    async def _pull(self, turn_id: str, task: PrefillTask, context: Context) -> None:
        """Pulls a prefill and hands what comes to the turn."""
        assert self._prefill is not None, "an engine without prefill servers hands nothing over"
        try:
            async with aclosing(self._prefill.stream(task, context.time_remaining())) as events:
                async for event in events:
                    self._engine.intake(turn_id, event)
        except GriffinError as error:
            self._engine.fail(turn_id, error)
        except Exception as error:
            self._engine.fail(turn_id, EngineFault(f"{type(error).__name__}: {error}"))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        model, spec = self._model, self._model.decoder.spec
        return pb.GetModelInfoResponse(
            model=model.name,
            family=spec.family,
            fingerprint=model.fingerprint,
            layers=len(spec.layers),
            width=spec.width,
            ff_width=spec.ff_width,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            vocabulary=spec.vocabulary,
            context_length=spec.context_length,
            dtype=str(model.decoder.dtype).removeprefix("torch."),
            device=str(model.decoder.device),
            role=self._role,
            has_chat_template=model.tokenizer.has_chat_template,
            default_density=self._engine.selection.density,
            default_policy=convert.policy_to_pb(self._engine.selection.policy),
            default_sharing=convert.sharing_to_pb(self._engine.sharing),
            max_sessions=self._engine.limits.max_sessions,
            version=__version__,
            default_sampling=convert.sampling_defaults_to_pb(self._sampling_defaults),
            batch_invariant=self._engine.batch_invariant,
        )

    async def GetSession(
        self, request: pb.GetSessionRequest, context: Context
    ) -> pb.GetSessionResponse:
        info = await asyncio.wrap_future(self._engine.session(request.session_id))
        return pb.GetSessionResponse(session=convert.session_to_pb(info))

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        after, most = self._page_tokens.read(request.page_token), convert.page_size(request)
        page = await asyncio.wrap_future(self._engine.session_page(after=after, most=most))
        return pb.ListSessionsResponse(
            sessions=[convert.session_to_pb(info) for info in page.sessions],
            next_page_token=self._page_tokens.write(page.last),
            total_size=page.total,
        )

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        await asyncio.wrap_future(self._engine.close(request.session_id))
        return pb.CloseSessionResponse()
