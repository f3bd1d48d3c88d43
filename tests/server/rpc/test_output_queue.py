"""What the engine's thread puts into channels, and what coroutines take out of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from griffin_server.rpc.output_queue import Channel, Mail


def on_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


async def take(channel: Channel[int], count: int) -> list[int]:
    taken = []
    async for event in channel:
        taken.append(event)
        if len(taken) == count:
            break
    return taken


async def test_the_events_of_all_channels_cost_one_call_of_the_loop() -> None:
    mail, loop = Mail(), asyncio.get_running_loop()
    channels = [Channel[int](8, lambda: None, mail) for _ in range(16)]
    calls = []
    call = loop.call_soon_threadsafe

    def counted(callback: Callable[..., object], *arguments: object, **named: Any) -> object:
        if getattr(callback, "__self__", None) is mail:
            calls.append(callback)
        return call(callback, *arguments, **named)

    loop.call_soon_threadsafe = counted  # type: ignore[assignment]

    def step() -> None:
        for value in range(3):
            for channel in channels:
                channel.put(value)

    on_a_thread(step)  # the loop stands still meanwhile
    assert len(calls) == 1
    assert [await take(channel, 3) for channel in channels] == [[0, 1, 2]] * 16
    on_a_thread(step)
    assert len(calls) == 2
    assert [await take(channel, 3) for channel in channels] == [[0, 1, 2]] * 16


async def test_events_put_while_others_are_delivered_come_in_order() -> None:
    channel = Channel[int](10_000, lambda: None, Mail())

    def put() -> None:
        for value in range(5_000):
            channel.put(value)

    thread = threading.Thread(target=put)
    thread.start()
    assert await asyncio.wait_for(take(channel, 5_000), 30) == list(range(5_000))
    thread.join()


async def test_a_full_channel_is_not_ready_and_wakes_the_engine_once_read() -> None:
    woken = []
    channel = Channel[int](2, lambda: woken.append(channel.ready()), Mail())
    on_a_thread(lambda: [channel.put(value) for value in range(2)] and None)
    assert not channel.ready() and not woken
    assert await take(channel, 1) == [0]
    assert woken == [True]


def test_what_is_put_after_the_loop_has_closed_is_dropped() -> None:
    async def made() -> Channel[int]:
        return Channel[int](8, lambda: None, Mail())

    asyncio.run(made()).put(1)
