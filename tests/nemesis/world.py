"""Two prefill servers, a spoiling one, a decode server, and clients: real processes and sockets."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from griffin_client import Event, Finished, GriffinClient, GriffinClientError, Started, Tokens
from tests.nemesis.clocks import Clocks, pings
from tests.nemesis.proxy import Mode, Proxy, Wires
from tests.nemesis.spoiler import Spoiler
from tests.servers import eventually, is_alive

USUAL = (
    "--device=cpu",
    "--threads=1",
    "--dtype=float32",
    "--sharing=private",
    "--prefill-chunk-tokens=64",
    "--local-prefill-max-tokens=0",
    "--max-sessions=8",
    "--max-queue=64",
    "--session-memory-gib=0.1",
)


class Nursery:
    """Forks servers; see ``nursery``."""

    def __init__(self, folder: Path, pace: float | None) -> None:
        self._folder = folder
        command = [sys.executable, "-m", "tests.nemesis.nursery", *([str(pace)] if pace else [])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        self._count = 0
        self._lock = threading.Lock()

    def server(self, *arguments: str, **order: Any) -> Server:
        """A new server, which is starting."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._count += 1
            path = self._folder / f"server-{self._count}"
            jam = f"{path}.jam"
            asked = {"arguments": arguments, "log": f"{path}.log", "jam": jam, **order}
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            pid = int(self._process.stdout.readline())
        return Server(pid=pid, log=Path(f"{path}.log"), jam=Path(jam))

    def close(self) -> None:
        """Ends it, and kills its servers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass(kw_only=True)
class Server:
    """A server process."""

    pid: int
    log: Path
    jam: Path

    def events(self, name: str) -> list[dict[str, Any]]:
        """What its log says under a name."""
        with contextlib.suppress(FileNotFoundError):
            lines = self.log.read_text("utf-8").splitlines()
            found = []
            for line in lines:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if event.get("event") == name:
                        found.append(event)
            return found
        return []

    @property
    def address(self) -> str:
        """Where it serves, once it does."""
        eventually(lambda: bool(self.events("serving")) or not self.alive, within_s=60)
        assert self.alive, self.log.read_text("utf-8")
        return str(self.events("serving")[-1]["address"])

    @property
    def alive(self) -> bool:
        """Whether the process exists and is no zombie."""
        return is_alive(self.pid)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, to a process that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send(signal.SIGKILL)
        eventually(lambda: not self.alive)

    def holds(self) -> dict[str, int]:
        """Its descriptors, threads and resident kilobytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        values = dict(line.split(":", 1) for line in status.splitlines())
        return {
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": int(values["Threads"]),
            "kilobytes": int(values["VmRSS"].split()[0]),
        }


@dataclass(kw_only=True)
class Call:
    """One call, and what came of it. The judge reads these."""

    request: dict[str, Any]
    deadline_s: float
    began: float = 0.0
    ended: float = 0.0
    ends: int = 0
    """How often it ended; a call ends once."""
    ids: list[int] = field(default_factory=list)
    session_id: str = ""
    code: str = ""
    reason: str | None = None
    words: str = ""
    retry_after_s: float | None = None
    finished: bool = False

    def run(self, client: GriffinClient) -> None:
        """Makes the call."""
        self.began = time.monotonic()
        try:
            stream = client.generate(**self.request, timeout=self.deadline_s)
            for event in stream:
                self._take(event)
            self.code = "OK"
        except GriffinClientError as error:
            self.code, self.reason, self.words = error.code.name, error.reason, error.message
            self.retry_after_s = getattr(error, "retry_after_s", None)
        self.ended = time.monotonic()
        self.ends += 1

    def _take(self, event: Event) -> None:
        assert not self.finished, "an event came after the last one"
        match event:
            case Started():
                self.session_id = event.session_id
            case Tokens():
                self.ids += event.ids
            case Finished():
                self.finished = True


class World:
    """The servers, wired through proxies, and the answers that they give in quiet times."""

    KINDS = 12
    """How many different requests there are."""

    def __init__(self, folder: Path, model: str, clocks: Clocks) -> None:
        self.folder = folder
        self.last_error = ""
        self.model = model
        self.clocks = clocks
        self.nursery = Nursery(folder, clocks.pace)
        self.wires = Wires()
        self.sockets = folder / "handoff"
        self.prefill = [self.start_prefill(), self.start_prefill()]
        self.to_prefill = [self.wires.proxy(server.address) for server in self.prefill]
        self.spoiler = Spoiler(self.prefill[1].address)
        self.decode = self.start_decode()
        self.to_decode = self.wires.proxy(self.decode.address)
        draw = random.Random(1)
        self.requests = [
            {
                "token_ids": [draw.randrange(3, 250) for _ in range(draw.randrange(100, 1000))],
                "max_tokens": draw.randrange(3, 25),
                "density": draw.choice((1.0, 0.5)),
                "ignore_eos": True,
                "temperature": 0.0,
            }
            for _ in range(self.KINDS)
        ]
        with self.client() as client:
            self.quiet = [client.complete(**request).token_ids for request in self.requests]
        self.settle()

    # -- its servers -----------------------------------------------------------------------------

    def _common(self) -> tuple[str, ...]:
        own = ("--model", self.model, "--port=0", f"--handoff-dir={self.sockets}")
        return (*own, *USUAL, *self.clocks.settings)

    def start_prefill(self, **order: Any) -> Server:
        """A prefill server."""
        return self.nursery.server(*self._common(), "--role=prefill", **order)

    def start_decode(self, *more: str, **order: Any) -> Server:
        """A decode server with the spoiling one first, since the first of equals is chosen."""
        targets = (self.spoiler.address, *(proxy.address for proxy in self.to_prefill))
        return self.nursery.server(
            *self._common(),
            "--role=decode",
            f"--prefill-target={','.join(targets)}",
            *more,
            **order,
        )

    def replace_prefill(self, which: int) -> None:
        """Puts a new prefill server behind its proxy."""
        self.prefill[which].kill()
        self.prefill[which] = self.start_prefill()
        self.to_prefill[which].target = self.prefill[which].address
        if which == 1:
            self.spoiler.target = self.prefill[which].address

    def replace_decode(self, *more: str, **order: Any) -> None:
        """Puts a new decode server behind its proxy."""
        self.decode.kill()
        self.decode = self.start_decode(*more, **order)
        self.to_decode.target = self.decode.address

    @property
    def servers(self) -> list[Server]:
        return [self.decode, *self.prefill]

    def switch(self, proxies: Sequence[Proxy], mode: Mode) -> None:
        """Changes what proxies do."""
        for proxy in proxies:
            self.wires.set(proxy, mode)

    @contextlib.contextmanager
    def client(self, *, direct: bool = False) -> Any:
        """A client that does not retry; with hurried clocks on a connection of its own."""
        target = self.decode.address if direct else self.to_decode.address
        if self.clocks.pace is None:
            with GriffinClient(target, max_retries=0) as client:
                yield client
            return
        options = [
            *pings(self.clocks.pace).items(),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.min_reconnect_backoff_ms", int(600 * self.clocks.pace)),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        with grpc.insecure_channel(target, options=options) as channel:
            yield GriffinClient(channel=channel, max_retries=0)

    # -- its state -------------------------------------------------------------------------------

    def answers(self) -> bool:
        """Whether a call is answered as in quiet times."""
        try:
            with self.client(direct=True) as client:
                done = client.complete(**self.requests[0], timeout=5)
        except GriffinClientError as error:
            self.last_error = str(error)
            return False
        self.last_error = ""
        return bool(done.token_ids == self.quiet[0])

    def decode_says_not_serving(self) -> bool:
        """What the decode server answers to a health check."""
        with grpc.insecure_channel(self.decode.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        return bool(answer.status == health_pb2.HealthCheckResponse.NOT_SERVING)

    def sessions(self) -> set[str]:
        """The ids of the decode server's sessions."""
        with self.client(direct=True) as client:
            return {session.session_id for session in client.list_sessions(timeout=5)}

    def settle(self) -> None:
        """Waits until everything is served again and nothing is left of earlier calls."""
        try:
            eventually(self.answers, within_s=self.clocks.recovers_s)
            eventually(lambda: not self.sessions(), within_s=5)
        except AssertionError as error:
            said = {
                server.log.name: server.log.read_text("utf-8")[-2000:] for server in self.servers
            }
            raise AssertionError(
                f"not served again, or sessions are left: {self.last_error}; {said}"
            ) from error

    def close(self) -> None:
        """Ends everything."""
        self.nursery.close()
        self.spoiler.close()
        self.wires.close()
