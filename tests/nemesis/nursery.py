"""Starts servers quickly: a process that has imported everything, and forks a server when told.

    python -m tests.nemesis.nursery PACE

Each line of its input is a JSON object: ``arguments`` of `griffin serve`, ``log`` for the file of
its output, ``descriptors`` for the most files that it may have open, ``file_bytes`` for the largest
file that it may write. It answers with the process's id. With a pace (see ``clocks``) the clocks
that are no settings, those of connections above all, run up to twenty times as fast.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any
from unittest.mock import patch

import griffin_core  # noqa: F401  # before torch
from griffin_core.engine.loop import EngineLoop
from griffin_core.engine.prefill_queue import PrefillQueue
from griffin_core.slim.costs import ASSUMED_COSTS
from griffin_server import app, connections, listener
from griffin_server.commands import app as griffin
from griffin_server.prefill_pool import client, health
from tests.nemesis.clocks import pings

JAM = "NEMESIS_JAM"
"""The environment variable with the path of a file. While it exists, the engine's thread stands
still in its next step."""


def set_pace(pace: float) -> None:
    """Lets the clocks that are no settings run faster."""
    faster = pings(pace)

    def fast(options: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return [(name, faster.get(name, value)) for name, value in options]

    whole = connections.server_options
    listener.server_options = lambda *given: fast(whole(*given))  # type: ignore[attr-defined]
    connections.PREFILL_CHANNEL_OPTIONS[:] = fast(connections.PREFILL_CHANNEL_OPTIONS)
    client.CONNECT_S = 0.5 * pace
    health.PROBE_S = 0.1 * pace
    app.WATCH_S = 0.05 * pace
    app.STUCK_STOP_S = 0.2 * pace
    listener.STATUSES_S, listener.WATCHERS_S = 0.5 * pace, 0.2 * pace


def allow_jams() -> None:
    """Lets the engine stand still while the file of ``JAM`` exists."""
    for kind, name in ((EngineLoop, "step"), (PrefillQueue, "run_pass")):
        whole = getattr(kind, name)

        def jammed(this: Any, whole: Any = whole) -> None:
            while this.has_work and os.path.exists(os.environ.get(JAM, "")):
                time.sleep(0.01)
            whole(this)

        setattr(kind, name, jammed)


def serve(order: dict[str, Any]) -> None:
    """In the forked process: serves until it is told to stop."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    for name, limit in (
        ("descriptors", resource.RLIMIT_NOFILE),
        ("file_bytes", resource.RLIMIT_FSIZE),
    ):
        if order.get(name) is not None:
            resource.setrlimit(limit, (order[name], order[name]))
    os.environ[JAM] = order.get("jam", "")
    with patch("griffin_core.engine.step_setup.measure_costs", lambda *_: ASSUMED_COSTS):
        griffin(["serve", "--log-format", "json", *order["arguments"]])


def main() -> None:
    """Forks a server for each line, until its input ends; then all servers are killed."""
    if sys.argv[1:]:
        set_pace(float(sys.argv[1]))
    allow_jams()
    assert threading.active_count() == 1, "a fork takes one thread along"
    children = []  # none is waited for before the end, so that none's id is given to another
    for line in sys.stdin:
        child = os.fork()
        if not child:
            sys.stdin.close()
            try:
                serve(json.loads(line))
            finally:  # nothing of the parent's may run here
                os.kill(os.getpid(), signal.SIGKILL)
        children.append(child)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
