"""Runs AnalyzePrompt: a dense prefill that reports activations, the statistic and the experts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from griffin.v1 import generation_pb2 as pb
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import PrefillBegun
from griffin_core.engine.task import PrefillTask
from griffin_core.errors import CapacityExhausted
from griffin_core.experts.selection import Selection
from griffin_core.forward.events import (
    LayerActivations,
    LayerExperts,
)
from griffin_core.forward.prefill import prefill
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.load import Model
from griffin_server.rpc.messages.prompt_analysis import analyze_task, event_to_pb, started_to_pb
from griffin_server.rpc.output_queue import LoopBridge
from griffin_server.rpc.run_prefill import run_prefill
from griffin_server.telemetry.context import request_id_var
from griffin_server.telemetry.metrics import Request


async def analyze(
    engine: Engine, task: PrefillTask, bridge: LoopBridge, counts: Request
) -> AsyncGenerator[pb.AnalyzePromptResponse, None]:
    """The messages of an analysis that the engine runs for a call.

    Raises:
        CapacityExhausted: the prompt needs more KV cache than the server has.
        GriffinError: the prefill failed.
    """
    decoder, tokenizer = engine.model.decoder, engine.model.tokenizer
    needed = kv_bytes(decoder.spec, decoder.dtype, len(task.token_ids))
    if needed > (allowed := engine.session_bytes):
        raise CapacityExhausted(
            f"memory: the prompt needs {needed} bytes of KV cache; the server allows "
            f"{allowed} in all. Give fewer tokens",
            retry_after_s=None,
        )
    async with aclosing(run_prefill(engine, task, bridge)) as events:
        # Messages are made off the loop: that decodes thousands of tokens or waits for a GPU.
        async for event in events:
            match event:
                case PrefillBegun():
                    counts.read(len(task.token_ids))
                    yield await asyncio.to_thread(
                        started_to_pb, task, tokenizer, decoder.spec, request_id_var.get()
                    )
                case LayerActivations() | LayerExperts():
                    for message in await asyncio.to_thread(event_to_pb, event):
                        yield message
    counts.finish_reason = "ANALYZED"


def analyze_in_process(
    model: Model, request: pb.AnalyzePromptRequest, base: Selection
) -> Iterator[pb.AnalyzePromptResponse]:
    """The messages of an analysis by a model in this process, without a server.

    Raises:
        InvalidRequest: a field is out of range; the error names the field, value and range.
    """
    decoder, tokenizer = model.decoder, model.tokenizer
    task = analyze_task(
        request, tokenizer, decoder.spec, base=base, calibration=decoder.calibration
    )
    yield started_to_pb(task, tokenizer, decoder.spec, request.request_id)
    for event in prefill(decoder, task.token_ids, task.selection, watch=task.watch):
        if isinstance(event, LayerActivations | LayerExperts):
            yield from event_to_pb(event)
