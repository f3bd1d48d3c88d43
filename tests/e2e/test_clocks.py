"""Processes that stop without ending are noticed, and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from griffin_client import GriffinClient, GriffinClientError, Unavailable, channel
from tests.servers import Process
from tests.tiny import make_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

JAMMED = """
import sys, time
from griffin_core.engine.loop import EngineLoop
step = EngineLoop.step
def jam(loop):
    if loop.parts.token_steps.has_work:
        time.sleep(3600)
    step(loop)
EngineLoop.step = jam
sys.argv = ["griffin", *sys.argv[1:]]
from griffin_server.__main__ import main
main()
"""
"""A server whose engine never ends its first step."""


def test_a_server_that_is_stopped_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pings, without a deadline. The times are shorter than the client's own ones; gRPC would
    wait for a minute if it were not told how long to wait for a ping."""
    make_tiny("llama", tmp_path)
    shorter = {"grpc.keepalive_time_ms": 5_000}
    options = [
        (name, shorter.get(name, 1_000 if name.endswith("timeout_ms") else value))
        for name, value in channel.CHANNEL_OPTIONS
    ]
    monkeypatch.setattr(channel, "CHANNEL_OPTIONS", options)
    with (
        Process("--model", str(tmp_path), "--threads", "1") as server,
        GriffinClient(server.target(), max_retries=0) as client,
    ):
        stream = client.generate("a", max_tokens=250, ignore_eos=True)
        next(stream)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            clock = time.monotonic()
            with pytest.raises(Unavailable):
                list(stream)
                client.model_info()
            assert time.monotonic() - clock < 20
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_a_server_with_a_stuck_engine_ends_when_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its grace, since the calls would not end."""
    make_tiny("llama", tmp_path)
    whole = subprocess.Popen

    def popen(command: list[str], **options: object) -> subprocess.Popen[str]:
        assert command[:3] == [sys.executable, "-m", "griffin_server"]
        return whole([sys.executable, "-c", JAMMED, *command[3:]], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", popen)
    settings = ("--stuck-after-s", "1", "--shutdown-grace-s", "100", "--threads", "1")
    with (
        Process("--model", str(tmp_path), *settings) as server,
        GriffinClient(server.target(), max_retries=0) as client,
    ):
        with pytest.raises(GriffinClientError):
            client.complete("a", max_tokens=4, timeout=3)
        clock = time.monotonic()
        server.terminate()
        assert server.wait(60) == 1
        assert time.monotonic() - clock < 20
