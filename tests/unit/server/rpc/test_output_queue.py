"""What the engine's thread puts into queues, and what coroutines take out of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from griffin_server.rpc.output_queue import LoopBridge, OutputQueue


def on_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


async def take(queue: OutputQueue[int], count: int) -> list[int]:
    taken = []
    async for event in queue:
        taken.append(event)
        if len(taken) == count:
            break
    return taken


async def test_the_events_of_all_channels_cost_one_call_of_the_loop() -> None:
    bridge, loop = LoopBridge(), asyncio.get_running_loop()
    queues = [OutputQueue[int](8, lambda: None, bridge) for _ in range(16)]
    calls = []
    call = loop.call_soon_threadsafe

    def counted(callback: Callable[..., object], *arguments: object, **named: Any) -> object:
        if getattr(callback, "__self__", None) is bridge:
            calls.append(callback)
        return call(callback, *arguments, **named)

    loop.call_soon_threadsafe = counted  # type: ignore[assignment]

    def step() -> None:
        for value in range(3):
            for queue in queues:
                queue.put(value)

    on_a_thread(step)  # the loop stands still meanwhile
    assert len(calls) == 1
    assert [await take(queue, 3) for queue in queues] == [[0, 1, 2]] * 16
    on_a_thread(step)
    assert len(calls) == 2
    assert [await take(queue, 3) for queue in queues] == [[0, 1, 2]] * 16


async def test_events_put_while_others_are_delivered_come_in_order() -> None:
    queue = OutputQueue[int](10_000, lambda: None, LoopBridge())

    def put() -> None:
        for value in range(5_000):
            queue.put(value)

    thread = threading.Thread(target=put)
    thread.start()
    assert await asyncio.wait_for(take(queue, 5_000), 30) == list(range(5_000))
    thread.join()


async def test_a_full_channel_is_not_ready_and_wakes_the_engine_once_read() -> None:
    woken = []
    queue = OutputQueue[int](2, lambda: woken.append(queue.ready()), LoopBridge())
    on_a_thread(lambda: [queue.put(value) for value in range(2)] and None)
    assert not queue.ready() and not woken
    assert await take(queue, 1) == [0]
    assert woken == [True]


def test_what_is_put_after_the_loop_has_closed_is_dropped() -> None:
    async def made() -> OutputQueue[int]:
        return OutputQueue[int](8, lambda: None, LoopBridge())

    asyncio.run(made()).put(1)
