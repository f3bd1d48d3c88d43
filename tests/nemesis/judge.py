"""Reads the history of a run: what clients saw, and what is left in the servers."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.nemesis.faults import Fault
from tests.nemesis.world import Call, World
from tests.servers import eventually

LATE_S = 1.0
"""How much later than its deadline a call may end."""

MORE_DESCRIPTORS, MORE_THREADS, MORE_KB = 24, 40, 128 << 10
"""How much more than in its first run a server may hold in a later one: asyncio has up to 32
threads for what would block its loop, and gRPC and the allocator keep some of what they have
needed."""


@dataclass
class Tally:
    """What came of the runs of a fault."""

    runs: int = 0
    retried: int = 0
    """How many prompts were given to another prefill server."""
    calls: Counter[str] = field(default_factory=Counter)
    holds: dict[int, dict[str, int]] = field(default_factory=dict)


class Traffic:
    """Clients that call again and again, until they are told to end."""

    CLIENTS = 3

    def __init__(self, world: World, draw: random.Random) -> None:
        self._world = world
        self._goes_on = True
        self._calls: list[tuple[Call, Sequence[int]]] = []
        seeds = [draw.random() for _ in range(self.CLIENTS)]
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in seeds]
        for thread in self._threads:
            thread.start()

    def _work(self, seed: float) -> None:
        draw = random.Random(seed)
        with self._world.client() as client:
            while self._goes_on:
                kind = draw.randrange(self._world.KINDS)
                call = Call(
                    request=self._world.requests[kind], deadline_s=self._world.clocks.deadline_s
                )
                self._calls.append((call, self._world.quiet[kind]))
                call.run(client)
                time.sleep(0.01 if call.code == "OK" else 0.1)

    def end(self) -> Sequence[tuple[Call, Sequence[int]]]:
        """All calls, once they have ended, with the tokens of quiet times."""
        self._goes_on = False
        for thread in self._threads:
            thread.join(self._world.clocks.deadline_s + 2 * LATE_S)
            assert not thread.is_alive(), "a call does not end"
        return self._calls


def check_call(call: Call, quiet: Sequence[int], codes: frozenset[str]) -> None:
    """Whether a call ended once, in time, typed, and with right tokens as far as it had any."""
    said = f"{call.code} {call.reason} {call.words!r} after {call.ended - call.began:.2f} s"
    assert call.ends == 1, f"ended {call.ends} times"
    assert call.ended - call.began <= call.deadline_s + LATE_S, f"late: {said}"
    assert call.code == "OK" or call.code in codes, said
    assert "evil" not in call.words, said
    assert call.code != "RESOURCE_EXHAUSTED" or call.retry_after_s, f"no retry hint: {said}"
    if call.code == "OK":
        assert call.finished and call.ids == list(quiet), f"other tokens: {said}"
    else:
        assert call.ids == list(quiet)[: len(call.ids)], f"other tokens: {said}"


def run(world: World, fault: Fault, seed: int, tally: Tally) -> None:
    """One run: some calls, a fault among them, and the judge's look at both."""
    draw = random.Random(seed)
    shared = set(os.listdir("/dev/shm"))
    retried = len(world.decode.events("prefill retried"))
    traffic, decode = Traffic(world, draw), world.decode
    time.sleep(draw.uniform(0.05, 0.25))
    try:
        heal = fault.inject(world, draw)
        try:
            time.sleep(fault.seconds(world.clocks, draw))
        finally:
            heal()
    finally:
        calls = traffic.end()
    for call, quiet in calls:
        check_call(call, quiet, fault.codes)
        tally.calls[call.code] += 1
    tally.retried += len(decode.events("prefill retried")) - retried
    world.settle()
    check_left(world, tally, shared)
    tally.runs += 1


def check_left(world: World, tally: Tally, shared: set[str]) -> None:
    """Whether the servers hold no more than in their first runs."""
    new = {name for name in set(os.listdir("/dev/shm")) - shared if "griffin" in name}
    assert not new, new
    left = [path for path in Path(world.sockets).iterdir() if path.is_socket()]
    assert len(left) == 1, left
    for server in world.servers:
        first = tally.holds.setdefault(server.pid, server.holds())

        def fits(server: object = server, first: dict[str, int] = first) -> bool:
            now = server.holds()  # type: ignore[attr-defined]
            return bool(
                now["descriptors"] <= first["descriptors"] + MORE_DESCRIPTORS
                and now["threads"] <= first["threads"] + MORE_THREADS
                and now["kilobytes"] <= first["kilobytes"] + MORE_KB
            )

        try:
            eventually(fits, within_s=5)
        except AssertionError:
            raise AssertionError(f"first {first}, now {server.holds()}") from None
