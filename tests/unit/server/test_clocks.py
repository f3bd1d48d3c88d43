"""Whatever waits for another process has a clock."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from griffin_client import DeadlineExceeded, Unavailable
from griffin_core.engine.loop import EngineLoop
from griffin_core.engine.turn_clock import TurnClock
from griffin_core.model.load import Model
from griffin_server import app, connections
from griffin_server.rpc import prefill
from tests.servers import eventually, free_port, running

FOUR = {"max_tokens": 4, "ignore_eos": True}


class Silent:
    """Lets the prefill servers of this process send nothing after their headers, one after the
    other, as often as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.ended = 0
        whole, left = prefill.run_prefill, [None] * times

        async def run(*arguments: Any) -> AsyncIterator[Any]:
            if left:
                left.pop()
                try:
                    await asyncio.sleep(600)
                finally:
                    self.ended += 1
            async for event in whole(*arguments):
                yield event

        monkeypatch.setattr(prefill, "run_prefill", run)


def test_a_silent_prefill_server_is_given_up_and_another_tried(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    silent = Silent(monkeypatch, times=1)
    with (
        running(model, role="prefill") as one,
        running(model, role="prefill") as other,
        running(
            model,
            role="decode",
            prefill_target=f"{one.target},{other.target}",
            handoff_timeout_s=0.5,
        ) as decode,
        decode.client() as client,
    ):
        clock = time.monotonic()
        made = client.complete("hello", **FOUR)
        assert made.finished.usage.generated_tokens == 4
        assert 0.5 <= time.monotonic() - clock < 10
        assert silent.ended == 1  # the call was cancelled, so that its place is free


def test_a_prompt_that_no_prefill_server_reads_fails_in_time(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    Silent(monkeypatch, times=1)
    with (
        running(model, role="prefill") as one,
        running(model, role="decode", prefill_target=one.target, handoff_timeout_s=0.5) as decode,
        decode.client() as client,
    ):
        with pytest.raises(Unavailable, match="sent nothing for") as caught:
            client.complete("hello", **FOUR)
        assert caught.value.reason == "HANDOFF_BROKEN"
        assert client.complete("hello", **FOUR).finished.usage.generated_tokens == 4


class Jam:
    """Holds the engine's thread in its next step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released = threading.Event()
        step, self.jammed = EngineLoop.step, threading.Event()

        def jam(loop: EngineLoop) -> None:
            if loop.has_work:
                self.jammed.set()
                self.released.wait(60)
            step(loop)

        monkeypatch.setattr(EngineLoop, "step", jam)


def test_a_server_with_a_stuck_engine_says_so_until_it_goes_on(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "WATCH_S", 0.05)
    port = free_port()
    with (
        running(tiny("llama"), stuck_after_s=0.5, metrics_port=port) as server,
        server.client() as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        client.complete("a", **FOUR)
        health = health_pb2_grpc.HealthStub(channel)

        def says() -> tuple[int, int, int]:
            status = health.Check(health_pb2.HealthCheckRequest()).status
            codes = (answer(f"http://localhost:{port}/{path}") for path in ("livez", "readyz"))
            return (status, *codes)

        serving, not_serving = (
            health_pb2.HealthCheckResponse.SERVING,
            health_pb2.HealthCheckResponse.NOT_SERVING,
        )
        time.sleep(0.7)  # an engine that waits is not stuck
        assert says() == (serving, 200, 200)
        jam = Jam(monkeypatch)
        stream = client.generate("a", **FOUR)
        reader = threading.Thread(target=lambda: list(stream))
        reader.start()
        try:
            assert jam.jammed.wait(10)
            eventually(lambda: says() == (not_serving, 503, 503))
        finally:
            jam.released.set()
            reader.join()
        eventually(lambda: says() == (serving, 200, 200))
        assert client.complete("a", **FOUR).finished.reason == "max_tokens"


def test_a_long_turn_after_long_ones_is_not_stuck() -> None:
    clock = TurnClock()
    with clock.turn():
        time.sleep(0.1)
        assert clock.age_s >= 0.1
    assert clock.age_s == 0
    with clock.turn():
        time.sleep(0.2)
        assert not clock.stuck(0.05)  # ten times as long as before would be
        with clock.waiting():
            assert clock.age_s == 0
        assert clock.age_s < 0.2


def answer(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


# -- calls that set no deadline --------------------------------------------------------------------


def test_a_call_without_a_deadline_ends_with_the_servers(tiny: Callable[[str], Model]) -> None:
    """Nothing of it stays, and the next one is served."""
    with running(tiny("llama-long"), max_sessions=1, max_call_s=0.8) as server:
        with server.client() as client, pytest.raises(DeadlineExceeded, match="--max-call-s") as it:
            client.complete("a", max_tokens=20_000, ignore_eos=True)
        assert it.value.reason == "DEADLINE_PASSED"
        with server.client() as client:
            eventually(lambda: not list(client.list_sessions()))
            assert client.complete("a", **FOUR).finished.usage.generated_tokens == 4


def test_the_deadline_of_a_client_that_is_sooner_holds(tiny: Callable[[str], Model]) -> None:
    with running(tiny("llama-long"), max_call_s=60) as server, server.client() as client:
        with pytest.raises(DeadlineExceeded):
            client.complete("a", max_tokens=20_000, ignore_eos=True, timeout=0.5)
        assert client.complete("a", **FOUR).finished.usage.generated_tokens == 4


def test_a_handoff_has_the_same_bound(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    Silent(monkeypatch, times=1)
    with (
        running(model, role="prefill", max_call_s=0.5) as prefill_server,
        running(model, role="decode", prefill_target=prefill_server.target) as decode,
        decode.client() as client,
    ):
        with pytest.raises(DeadlineExceeded):
            client.complete("a", **FOUR)
        assert client.complete("a", **FOUR).finished.usage.generated_tokens == 4


def test_an_old_connection_gives_way_to_a_new_one_and_its_call_goes_on(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = connections.server_options

    def short(*given: Any) -> Any:
        return [*whole(*given), ("grpc.max_connection_age_ms", 300)]

    monkeypatch.setattr("griffin_server.listener.server_options", short)
    with running(tiny("llama-long")) as server, server.client() as client:
        stream = client.generate("a", max_tokens=600, ignore_eos=True)
        next(stream)
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            client.model_info()
        assert list(stream)[-1].reason == "max_tokens"  # type: ignore[union-attr]
