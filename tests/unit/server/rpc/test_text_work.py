"""Tokenizing: large requests do not hold up small ones, and nobody takes all places."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from griffin_client import GriffinClientError, ResourceExhausted
from griffin_core.errors import CapacityExhausted
from griffin_core.model.load import Model
from griffin_core.text.tokenizer import Tokenizer
from griffin_server.rpc.text_work import LARGE_BYTES, Lane, TextWork
from tests.servers import running

FEW = {"max_tokens": 2, "ignore_eos": True}


class Held:
    """Work that goes on until it is let go."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.done = 0

    def __call__(self) -> int:
        assert self.go_on.wait(30)
        self.done += 1
        return self.done


async def begun(lane: Lane, work: Held, owner: str, times: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(lane.run(work, owner)) for _ in range(times)]
    await asyncio.sleep(0)
    return tasks


async def test_a_lane_that_is_full_refuses_and_serves_again_later() -> None:
    lane, work = Lane("test", threads=1, most=4), Held()
    tasks = await begun(lane, work, "a", 4)
    with pytest.raises(CapacityExhausted, match="4 requests wait") as refused:
        await lane.run(work, "a")
    assert refused.value.retry_after_s
    work.go_on.set()
    assert sorted(await asyncio.gather(*tasks)) == [1, 2, 3, 4]
    assert await lane.run(work, "a") == 5


async def test_one_owner_leaves_places_for_others() -> None:
    lane, work = Lane("test", threads=1, most=8), Held()
    tasks = await begun(lane, work, "b", 1) + await begun(lane, work, "a", 4)
    with pytest.raises(CapacityExhausted, match="4 of them of this caller"):
        await lane.run(work, "a")
    tasks += await begun(lane, work, "c", 3)
    with pytest.raises(CapacityExhausted):
        await lane.run(work, "c")
    work.go_on.set()
    assert len(await asyncio.gather(*tasks)) == 8


async def test_work_that_nobody_waits_for_keeps_its_place_until_it_has_ended() -> None:
    lane, work = Lane("test", threads=1, most=1), Held()
    (task,) = await begun(lane, work, "a", 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(CapacityExhausted):
        await lane.run(work, "a")
    work.go_on.set()
    while True:
        try:
            assert await lane.run(work, "a") == 2
            break
        except CapacityExhausted:
            await asyncio.sleep(0.01)


async def test_what_work_raises_is_raised() -> None:
    lane = Lane("test", threads=1, most=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await lane.run(lambda: 1 // 0, "a")


async def test_small_requests_have_threads_of_their_own() -> None:
    lanes, work = TextWork(max_queue=16), Held()
    large = [asyncio.create_task(lanes.run(work, LARGE_BYTES, "a")) for _ in range(8)]
    await asyncio.sleep(0)
    assert await lanes.run(lambda: "small", LARGE_BYTES - 1, "a") == "small"
    with pytest.raises(CapacityExhausted):
        await lanes.run(work, LARGE_BYTES, "b")
    work.go_on.set()
    await asyncio.gather(*large)


def test_long_texts_are_refused_with_a_hint_and_short_ones_are_answered_meanwhile(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Tokenizer.encode

    def slow(self: Tokenizer, text: str, *rest: object, **options: object) -> object:
        if len(text) >= LARGE_BYTES // 2:
            time.sleep(0.2)
        return whole(self, text, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Tokenizer, "encode", slow)
    refused: list[GriffinClientError] = []
    with running(tiny("llama")) as server, server.client() as client:

        def call() -> None:
            with server.client() as mine:
                try:
                    mine.complete("a" * LARGE_BYTES, **FEW)
                except GriffinClientError as error:
                    refused.append(error)

        client.complete("a", **FEW)
        threads = [threading.Thread(target=call) for _ in range(20)]
        for thread in threads:
            thread.start()
        took = []
        while any(thread.is_alive() for thread in threads):
            clock = time.monotonic()
            client.complete("a", **FEW)
            took.append(time.monotonic() - clock)
        for thread in threads:
            thread.join()
    codes = [type(error).__name__ for error in refused]
    assert len(codes) == 20 and set(codes) == {"ResourceExhausted", "InvalidArgument"}
    full = [error for error in refused if isinstance(error, ResourceExhausted)]
    assert all(error.retry_after_s == 1.0 for error in full)
    assert len(full) == 12
    assert max(took) < 1  # each long text takes 0.2 s, and eight of them wait
