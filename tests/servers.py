"""Servers for tests: inside this process, on a thread of their own, or as processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from griffin.v1 import prefill_pb2
from griffin_client import GriffinClient
from griffin_core.model.load import Model
from griffin_core.slim.costs import ASSUMED_COSTS
from griffin_server.app import App
from griffin_server.settings import Settings

SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 16 << 10), ("grpc.http2.bdp_probe", 0)]
"""Options of a channel; with them a server notices soon that its client does not read."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server in this process."""

    app: App
    target: str
    prefill_target: str
    """Where it serves PrefillService; "None" if it does not."""

    def client(self) -> GriffinClient:
        """A client that does not retry: a test sees each error of the server."""
        return GriffinClient(self.target, max_retries=0)


@contextlib.contextmanager
def running(model: Model, **settings: Any) -> Iterator[Running]:
    """Runs a server with an event loop on another thread; in role decode, one that prefills
    nothing itself. Sessions are private, so that what one makes depends on nothing else; in which
    form they run is not measured either, since on tiny models that would be chance. The model runs
    on one thread, which is the fastest for tiny ones."""
    defaults = {"port": 0, "threads": 1, "density": 1.0, "sharing": "private"}
    app = App(Settings(**{**defaults, "local_prefill_max_tokens": 0, **settings}), model)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    with patch("griffin_core.engine.step_setup.measure_costs", lambda *_: ASSUMED_COSTS):
        call(app.start())
    try:
        yield Running(
            app=app,
            target=str(app.listener.address),
            prefill_target=str(app.listener.prefill_address),
        )
    finally:
        call(app.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Process:
    """`griffin serve` as a process of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "griffin_server", "serve", "--log-format", "json"]
        self._process = subprocess.Popen(
            [*command, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GRIFFIN_PORT": "0", **environment},
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def target(self, *, within_s: float = 60) -> str:
        """Its address, once it serves. Each line of its log comes within that time."""
        while (line := self._lines.get(timeout=within_s)) is not None:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == "serving":
                    return str(event["address"])
        raise AssertionError(f"the server ended: {''.join(self.log)}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 60) -> int:
        """Its exit code."""
        return self._process.wait(timeout)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()
        try:
            self.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


def segments() -> int:
    """How many segments of shared memory this process holds."""
    inodes = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the directory's own descriptor
            if os.readlink(path).startswith("/memfd:griffin-kv"):
                inodes.add(path.stat().st_ino)
    return len(inodes)


def process_state(pid: int) -> str:
    """The letter that the kernel has for a process's state (proc(5)); "" if there is none."""
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        return after_name.split()[0]
    return ""


def prefill_request(
    fingerprint: str, token_ids: Sequence[int], calibration_digest: str = ""
) -> bytes:
    """A request to PrefillService that nothing is wrong with, as it travels."""
    return prefill_pb2.PrefillRequest(
        model_fingerprint=fingerprint,
        calibration_digest=calibration_digest,
        token_ids=token_ids,
        selection=prefill_pb2.ExpertSelection(density=0.5),
        oldest_protocol_version=3,
        newest_protocol_version=3,
    ).SerializeToString()


def free_port() -> int:
    """A free port of 127.0.0.1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return process_state(pid) not in ("", "Z", "X")


def eventually(holds: Callable[[], bool], *, within_s: float = 10) -> None:
    """Waits until something holds that no event announces."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.005)
