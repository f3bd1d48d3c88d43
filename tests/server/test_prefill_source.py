"""Decode's way to a prefill server: what becomes of segments and of mistaken addresses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from griffin_core.errors import EngineFault, PrefillUnavailable
from griffin_core.experts.selection import Selection
from griffin_core.model.load import Model
from griffin_core.prefill_queue import PrefillTask
from griffin_server.handoff import shared_memory
from griffin_server.handoff.shared_memory import DIRECTORY, Segment
from griffin_server.prefill.source import PrefillServer
from tests.servers import Running, running

TASK = PrefillTask(token_ids=tuple(range(20)), selection=Selection(density=0.5))


async def test_a_pull_cancelled_while_its_segment_is_made_leaves_no_file(
    tiny: Callable[[str], Model], tiny_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(DIRECTORY.glob("griffin-*"))
    begun, go_on = threading.Event(), threading.Event()
    create = shared_memory.create_segment

    def slow(size_bytes: int) -> Segment | None:
        begun.set()
        go_on.wait(10)
        return create(size_bytes)

    monkeypatch.setattr(shared_memory, "create_segment", slow)
    source = PrefillServer(tiny_server.target, tiny("llama"), shared_memory=True)
    pull = asyncio.create_task(anext(source.stream(TASK, None)))
    await asyncio.to_thread(begun.wait, 10)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    go_on.set()
    await source.close()
    assert set(DIRECTORY.glob("griffin-*")) == before


async def test_a_server_that_does_not_prefill_is_named(tiny: Callable[[str], Model]) -> None:
    target = "127.0.0.1:1"
    with running(tiny("llama"), role="decode", prefill_target=target) as decode:
        source = PrefillServer(decode.target, tiny("llama"), shared_memory=False)
        with pytest.raises(EngineFault, match=decode.target):
            await anext(source.stream(TASK, None))
        await source.close()


async def test_no_server_is_unavailable(tiny: Callable[[str], Model]) -> None:
    source = PrefillServer("127.0.0.1:1", tiny("llama"), shared_memory=True)
    with pytest.raises(PrefillUnavailable, match=r"127\.0\.0\.1:1"):
        await anext(source.stream(TASK, None))
    await source.close()
