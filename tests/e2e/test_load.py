"""Many clients at once, and what they do to a server: hang up, time out, stop reading."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from griffin_client import (
    Aborted,
    AsyncGriffinClient,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from griffin_core.model.load import Model
from tests.servers import SMALL_WINDOW, Process, Running, eventually, running, segments
from tests.unit.core.engines import at_baseline

pytestmark = pytest.mark.e2e


@pytest.fixture
def model(tiny: Callable[[str], Model]) -> Model:
    return tiny("llama-long")


def several(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "ignore_eos": True}


@pytest.mark.timeout(300)
async def test_cancels_deadlines_and_readers_that_stop_leave_nothing_and_harm_nobody(
    model: Model, with_and_without_traces: bool
) -> None:
    part = 5 if with_and_without_traces else 1  # by then it is known to hold for many
    draw = random.Random(1)
    ends: Counter[str] = Counter()
    settings = {"reader_timeout_s": 1.0, "max_queue": 2000, "max_sessions": 32}
    with running(model, density=0.5, **settings) as server:
        async with AsyncGriffinClient(server.target, max_retries=0) as client:
            options = {"density": 0.25, **several(60), "seed": 3}
            expected = (await client.complete("an honest reader", **options)).token_ids

            async def hangs_up(number: int) -> None:
                events = client.generate(f"{number}" * 50, **several(300))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(draw.expovariate(1.0)):
                        async for _ in events:
                            pass
                await events.aclose()
                ends["hung up"] += 1

            async def times_out(number: int) -> None:
                try:
                    await client.complete(
                        f"{number}" * 20, **several(300), timeout=draw.uniform(0.001, 2)
                    )
                    ends["in time"] += 1
                except (DeadlineExceeded, ResourceExhausted) as error:
                    ends[type(error).__name__] += 1

            async def stops_reading(number: int) -> None:
                channel = grpc.aio.insecure_channel(
                    server.target, options=[*SMALL_WINDOW, ("grpc.use_local_subchannel_pool", 1)]
                )
                async with channel:
                    lazy = AsyncGriffinClient("", channel=channel, max_retries=0)
                    events = lazy.generate(f"{number}", **several(2000), top_logprobs=20)
                    session = (await anext(events)).session_id
                    with contextlib.suppress(NotFound):
                        while True:  # until the server has given it up, or made all of it
                            await client.get_session(session)
                            await asyncio.sleep(0.1)
                    try:
                        async for _ in events:
                            pass
                    except Aborted as error:
                        assert error.reason == "READER_TOO_SLOW"
                        ends["aborted"] += 1

            async def reads(_: int) -> None:
                done = await client.complete("an honest reader", **options)
                assert done.token_ids == expected
                ends["read"] += 1

            whole = {hangs_up: 500, times_out: 200, stops_reading: 50, reads: 50}
            counts = {each: times // part for each, times in whole.items()}
            calls = [each for each, times in counts.items() for _ in range(times)]
            draw.shuffle(calls)
            await asyncio.gather(*(call(number) for number, call in enumerate(calls)))
        eventually(lambda: at_baseline(server.app.engine))
        assert ends["hung up"] == counts[hangs_up]
        late = ends["DeadlineExceeded"] + ends["ResourceExhausted"]
        assert ends["in time"] + late == counts[times_out]
        assert ends["aborted"] == counts[stops_reading]
        assert ends["read"] == counts[reads]


@pytest.mark.timeout(120)
async def test_with_a_few_megabytes_requests_queue_or_come_back_later(model: Model) -> None:
    gib = (2 << 20) / (1 << 30)
    settings = {"session_memory_gib": gib, "idle_memory_gib": gib / 4, "max_queue": 4}
    with running(model, density=0.5, **settings) as server:
        ends: Counter[str] = Counter()
        async with AsyncGriffinClient(server.target, max_retries=0) as client:

            async def call(number: int) -> None:
                while True:
                    try:
                        await client.complete(
                            token_ids=[number % 250] * (1 + number * 7 % 900),
                            **several(1 + number * 13 % 50),
                            keep_session=number % 3 == 0,
                        )
                        ends["completed"] += 1
                        return
                    except ResourceExhausted as error:
                        ends["refused"] += 1
                        assert error.retry_after_s is not None and error.retry_after_s > 0
                        await asyncio.sleep(min(0.1, error.retry_after_s))

            await asyncio.gather(*(call(number) for number in range(60)))
            with pytest.raises(ResourceExhausted) as never:
                await client.complete(token_ids=[1] * 2000, **several(2000))
        assert never.value.retry_after_s is None
        assert ends["completed"] == 60 and ends["refused"] > 0
        assert server.app.engine.peak_bytes <= 2 << 20


def test_an_unknown_sharing_is_refused_by_name(model: Model) -> None:
    with running(model) as server, server.client() as client:
        with pytest.raises(InvalidArgument) as caught:
            client.complete("a", sharing="mine")  # type: ignore[arg-type]
        assert "pruning.sharing" in caught.value.violations
        assert "private" in str(caught.value) and "auto" in str(caught.value)


# -- several prefill servers -----------------------------------------------------------------------


def prefill_command(model: str) -> tuple[str, ...]:
    chunks = ("--prefill-chunk-tokens", "16")
    return ("--model", model, "--dtype", "float32", "--role", "prefill", *chunks)


def in_handoff(decode: Running) -> bool:
    """Whether some of a prompt's KV has come, and not all."""
    handoffs = decode.app.engine.snapshot().result(10).handoffs
    return any(64 < each.received[0] < 2000 for each in handoffs)


PROMPT = [number % 250 for number in range(3000)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("handoff", ["shared_memory", "messages"])
def test_a_prefill_server_that_dies_is_replaced_without_the_client_noticing(
    handoff: str, model: Model, tiny_directory: Callable[[str], object]
) -> None:
    directory = str(tiny_directory("llama-long"))
    before = segments()
    with (
        running(model, density=0.5) as alone,
        alone.client() as client,
    ):
        expected = client.complete(token_ids=PROMPT, **several(20)).token_ids
    settings = {"role": "decode", "handoff": handoff, "density": 0.5}
    with (
        contextlib.ExitStack() as stack,
        Process(*prefill_command(directory)) as one,
        Process(*prefill_command(directory)) as other,
        running(model, prefill_target=[one.target(), other.target()], **settings) as decode,
        decode.client() as client,
    ):
        processes = [one, other]
        servers = decode.app.prefill_router.clients
        targets = [server.target for server in servers]
        for _ in range(2):
            made: list[int] = []

            def call(made: list[int] = made) -> None:
                made += client.complete(token_ids=PROMPT, **several(20)).token_ids

            thread = threading.Thread(target=call)
            thread.start()
            eventually(lambda: in_handoff(decode))
            busy = servers.index(max(servers, key=lambda server: server.outstanding_tokens))
            processes[busy].kill()
            thread.join(60)
            assert tuple(made) == expected
            assert servers[busy].health.ejected
            port = targets[busy].rpartition(":")[2]
            again = Process(*prefill_command(directory), "--port", port)
            processes[busy] = stack.enter_context(again)
            processes[busy].target()
            eventually(lambda client=servers[busy]: not client.health.ejected)
        eventually(lambda: at_baseline(decode.app.engine))
    assert segments() == before
