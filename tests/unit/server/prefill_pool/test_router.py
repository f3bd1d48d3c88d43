"""The prefill pool: routing, retries, ejection, segments that are freed, and wrong addresses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import torch

from griffin_core.engine.prefill_run import PrefillRun
from griffin_core.engine.task import PrefillTask
from griffin_core.errors import DeadlinePassed, EngineFault, GriffinError, PrefillUnavailable
from griffin_core.experts.selection import Selection
from griffin_core.model.load import Model
from griffin_server.prefill_pool.client import PrefillClient
from griffin_server.prefill_pool.router import PrefillRouter
from griffin_server.rpc.prefill import PrefillServicer
from griffin_server.rpc.status import status_of
from griffin_server.telemetry.metrics import Metrics
from griffin_server.transfer import negotiation, shared_memory
from griffin_server.transfer.base import KvImporter, MemoryNotShared
from griffin_server.transfer.descriptors import DescriptorSocket
from griffin_server.transfer.messages import MessagesImporter
from griffin_server.transfer.shape import HandoffShape
from griffin_server.transfer.shared_memory import Segment, SegmentPool
from tests.servers import Running, running, segments

TASK = PrefillTask(token_ids=tuple(range(20)), selection=Selection(density=0.5))


async def test_a_pull_cancelled_while_its_segment_is_made_leaves_none(
    tiny: Callable[[str], Model],
    tiny_server: Running,
    giver: DescriptorSocket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = segments()
    begun, go_on = threading.Event(), threading.Event()
    create = shared_memory.create_segment

    def slow(size_bytes: int) -> Segment | None:
        begun.set()
        go_on.wait(10)
        return create(size_bytes)

    monkeypatch.setattr(shared_memory, "create_segment", slow)
    source = PrefillClient(tiny_server.prefill_target, tiny("llama"), Metrics(), descriptors=giver)
    pull = asyncio.create_task(anext(source.stream(TASK, None)))
    await asyncio.to_thread(begun.wait, 10)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    go_on.set()
    await source.close()
    assert segments() == before


async def test_a_server_that_does_not_prefill_is_named(tiny: Callable[[str], Model]) -> None:
    target = "127.0.0.1:1"
    with running(tiny("llama"), role="decode", prefill_target=target) as decode:
        source = PrefillClient(decode.target, tiny("llama"), Metrics(), "messages")
        with pytest.raises(EngineFault, match=decode.target):
            await anext(source.stream(TASK, None))
        await source.close()


async def test_no_server_is_unavailable(tiny: Callable[[str], Model]) -> None:
    source = PrefillClient("127.0.0.1:1", tiny("llama"), Metrics())
    with pytest.raises(PrefillUnavailable, match=r"127\.0\.0\.1:1"):
        await anext(source.stream(TASK, None))
    await source.close()


class Unreadable(MessagesImporter):
    """A transport whose memory cannot be read: not at its proof, or not at its KV."""

    def __init__(self, at: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._at = at

    def verify(self, header: Any) -> None:
        if self._at == "proof":
            raise MemoryNotShared("no such memory")

    def read(self, chunk: Any) -> Any:
        raise MemoryNotShared("no such memory")


@pytest.mark.parametrize("at", ["proof", "KV"])
async def test_a_transport_that_does_not_work_is_withdrawn_and_the_prefill_restarts(
    at: str,
    tiny: Callable[[str], Model],
    giver: DescriptorSocket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama")
    with running(model, role="prefill") as prefill:
        server = PrefillClient(prefill.target, model, Metrics(), descriptors=giver)
        usual, offered = negotiation.SharedMemoryImporter, []

        def first_unreadable(
            shape: HandoffShape,
            device: torch.device,
            segment: Segment,
            pool: SegmentPool,
            descriptors: DescriptorSocket,
        ) -> KvImporter:
            if offered:
                offered.append(usual(shape, device, segment, pool, descriptors))
            else:
                pool.release(segment)
                offered.append(Unreadable(at, shape, device))
            return offered[-1]

        monkeypatch.setattr(negotiation, "SharedMemoryImporter", first_unreadable)
        servers = PrefillRouter([server])
        made = await events_of(servers)
        assert made.count("PrefillRestarted") == 1 and made[-1] == "PrefillFinished"
        assert made.index("PrefillRestarted") == 0
        assert len(offered) == 2 and not server.health.ejected
        await servers.close()


# -- what is the server's fault, and what is not ---------------------------------------------------


async def events_of(servers: PrefillRouter, timeout_s: float | None = None) -> list[str]:
    return [type(event).__name__ async for event in servers.stream(TASK, timeout_s)]


@pytest.fixture
async def two(tiny: Callable[[str], Model]) -> AsyncIterator[tuple[PrefillRouter, list[Running]]]:
    model = tiny("llama")
    with running(model, role="prefill") as one, running(model, role="prefill") as other:
        servers = PrefillRouter(
            [PrefillClient(each.target, model, Metrics(), "messages") for each in (one, other)]
        )
        yield servers, [one, other]
        await servers.close()


async def test_the_final_status_of_a_verified_handoff_is_ignored(
    two: tuple[PrefillRouter, list[Running]], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, _ = two
    whole = PrefillServicer.Prefill

    async def dies(self: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        async for message in whole(self, request, context):
            yield message
        await context.abort(grpc.StatusCode.UNAVAILABLE, "killed before its trailers")

    monkeypatch.setattr(PrefillServicer, "Prefill", dies)
    for _ in range(3):
        made = await events_of(servers)
        assert made[-1] == "PrefillFinished" and "PrefillRestarted" not in made
    assert not any(client.health.ejected for client in servers.clients)


async def test_a_server_with_another_model_is_passed_over(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    with running(tiny("qwen2"), role="prefill") as bad, running(model, role="prefill") as good:
        servers = PrefillRouter(
            [PrefillClient(each.target, model, Metrics(), "messages") for each in (bad, good)]
        )
        assert "PrefillRestarted" in await events_of(servers)
        for _ in range(3):
            assert "PrefillRestarted" not in await events_of(servers)
        await servers.close()


async def test_a_server_that_fails_inside_is_ejected_and_the_prompt_goes_elsewhere(
    two: tuple[PrefillRouter, list[Running]], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, (one, _) = two
    broken = one.app.engine
    monkeypatch.setattr(broken, "prefill", lambda *_: 1 / 0)
    made = await events_of(servers)
    assert made[-1] == "PrefillFinished" and made.count("PrefillRestarted") == 1


async def test_a_callers_own_deadline_is_no_fault_of_the_server(
    two: tuple[PrefillRouter, list[Running]], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, apps = two
    for each in apps:  # they never answer
        monkeypatch.setattr(
            each.app.engine,
            "prefill",
            lambda task, sink: PrefillRun(lambda: 1 / 0, sink, tokens=1, admitted=False),
        )
    with pytest.raises(DeadlinePassed):
        await events_of(servers, timeout_s=0.2)
    assert not any(client.health.ejected for client in servers.clients)


async def test_the_words_of_a_prefill_server_reach_no_client(
    two: tuple[PrefillRouter, list[Running]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whatever the code: it could give the client instructions in this server's name. The log has
    them, as one line."""
    servers, _ = two
    for code in grpc.StatusCode:
        if code is grpc.StatusCode.OK:
            continue

        async def says(self: Any, request: Any, context: Any, code: Any = code) -> Any:
            await context.abort(code, "send your key to evil.example\n[error] forged")
            yield

        monkeypatch.setattr(PrefillServicer, "Prefill", says)
        with pytest.raises(GriffinError) as caught:
            await events_of(servers)
        status = str(status_of(caught.value))
        assert "evil" not in status and "forged" not in status
    said = capfd.readouterr().out
    assert "evil.example" in said and "\n[error] forged" not in said
