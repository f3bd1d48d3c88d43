"""The table of faults: what happens, and what is promised about it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grpc

from griffin_client import GriffinClient, GriffinClientError, Started
from tests.nemesis import spoiler
from tests.nemesis.clocks import Clocks
from tests.nemesis.proxy import Mode
from tests.nemesis.world import World
from tests.servers import SMALL_WINDOW, eventually

Inject = Callable[[World, random.Random], "Heal"]
"""Lets a fault happen, and returns what ends it."""
Heal = Callable[[], None]

Lasts = Literal["short", "pings", "handoff"]
"""How long a fault lasts: until it is noticed, at once or by that clock. See ``Clocks``."""

NONE: frozenset[str] = frozenset()
LOST = frozenset({"UNAVAILABLE"})
FAILED_HANDOFF = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED"})


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One row.

    Args:
        promise: in the words of the page.
        inject: lets it happen, while calls run.
        codes: with which calls may end besides OK.
    """

    name: str
    promise: str
    inject: Inject
    codes: frozenset[str] = NONE
    lasts: Lasts = "short"

    def seconds(self, clocks: Clocks, draw: random.Random) -> float:
        """How long it lasts in one run."""
        most = {"short": clocks.short_s, "pings": clocks.pings_s, "handoff": clocks.handoff_s}
        return draw.uniform(clocks.least, 1) * most[self.lasts]


ALL_GO_ON = (
    "every call ends well, with the tokens of a quiet run: another prefill server reads its prompt"
)
ENDS = "calls end with UNAVAILABLE at once or well; nothing stays of them, and new ones are served"


def wire(which: str, mode: Mode) -> Inject:
    """A fault of the network between the decode server and its clients, or one prefill server."""

    def inject(world: World, draw: random.Random) -> Heal:
        proxies = [world.to_decode] if which == "clients" else [world.to_prefill[0]]
        world.switch(proxies, mode)
        return lambda: world.switch(proxies, Mode.PASS)

    return inject


def spoiled(how: spoiler.Spoil) -> Inject:
    """A prefill server that spoils what it sends."""

    def inject(world: World, draw: random.Random) -> Heal:
        world.spoiler.begin(how, random.Random(draw.random()))
        return world.spoiler.end

    return inject


def nothing() -> None:
    """Nothing is left to heal."""


def joining(threads: Sequence[threading.Thread]) -> Heal:
    """Waits for clients that end by themselves."""

    def heal() -> None:
        for thread in threads:
            thread.join()

    return heal


def prefill_killed(world: World, draw: random.Random) -> Heal:
    world.prefill[0].kill()
    return lambda: world.replace_prefill(0)


def prefill_ended(world: World, draw: random.Random) -> Heal:
    world.prefill[0].send(signal.SIGTERM)

    def heal() -> None:
        eventually(lambda: not world.prefill[0].alive, within_s=world.clocks.ends_s)
        world.replace_prefill(0)

    return heal


def prefill_stopped(world: World, draw: random.Random) -> Heal:
    server = world.prefill[0]
    server.send(signal.SIGSTOP)
    return lambda: server.send(signal.SIGCONT)


def prefill_jammed(world: World, draw: random.Random) -> Heal:
    jam = world.prefill[0].jam
    jam.touch()
    return jam.unlink


def decode_killed(world: World, draw: random.Random) -> Heal:
    world.decode.kill()
    return world.replace_decode


def decode_ended(world: World, draw: random.Random) -> Heal:
    world.decode.send(signal.SIGTERM)

    def heal() -> None:
        eventually(lambda: not world.decode.alive, within_s=world.clocks.ends_s)
        world.replace_decode()

    return heal


def decode_stopped(world: World, draw: random.Random) -> Heal:
    world.decode.send(signal.SIGSTOP)
    return lambda: world.decode.send(signal.SIGCONT)


def decode_jammed(world: World, draw: random.Random) -> Heal:
    """The engine stands still for good; the server is told to end. It is a new one, since a turn
    that a SIGSTOP made long would keep the next one from counting as stuck."""
    world.replace_decode()
    world.decode.jam.touch()

    def heal() -> None:
        eventually(world.decode_says_not_serving, within_s=world.clocks.stuck_s)
        world.decode.send(signal.SIGTERM)
        eventually(lambda: not world.decode.alive, within_s=world.clocks.stuck_ends_s)
        world.replace_decode()

    return heal


def client_leaves(world: World, draw: random.Random) -> Heal:
    """Clients hang up at any time."""
    leaving = []
    for _ in range(6):
        stream_for = draw.random() * 0.3
        request = draw.choice(world.requests)

        def leave(stream_for: float = stream_for, request: dict[str, Any] = request) -> None:
            with world.client(direct=True) as client, contextlib.suppress(GriffinClientError):
                ends = time.monotonic() + stream_for
                stream = client.generate(**request)
                for _ in stream:
                    if time.monotonic() > ends:
                        break
                stream.close()

        leaving.append(threading.Thread(target=leave))
        leaving[-1].start()
    return joining(leaving)


def reader_stops(world: World, draw: random.Random) -> Heal:
    """A client takes one message and no other for as long as the fault lasts."""
    go_on = threading.Event()

    def read() -> None:
        with grpc.insecure_channel(world.decode.address, options=SMALL_WINDOW) as channel:
            lazy = GriffinClient(channel=channel, max_retries=0)
            stream = lazy.generate(
                token_ids=[5] * 20, max_tokens=4000, ignore_eos=True, top_logprobs=20
            )
            try:
                first = next(stream)
                assert isinstance(first, Started)
                session.append(first.session_id)
                go_on.wait(10 * world.clocks.reader_s)
                for _ in stream:
                    pass
            except GriffinClientError as error:
                ended.append(error.reason)

    session: list[str] = []
    ended: list[str | None] = []
    thread = threading.Thread(target=read)
    thread.start()

    def heal() -> None:
        # Its status cannot reach a client that does not read; its session is ended all the same.
        eventually(lambda: bool(session), within_s=world.clocks.reader_s)
        eventually(lambda: session[0] not in world.sessions(), within_s=world.clocks.reader_s)
        go_on.set()
        thread.join()
        assert ended == ["READER_TOO_SLOW"], ended

    return heal


GREETINGS = (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n")
"""How a connection may begin."""


def malformed(world: World, draw: random.Random) -> Heal:
    """Bytes that are no request, on connections of their own."""
    host, _, port = world.decode.address.rpartition(":")
    for _ in range(20):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as raw:
            raw.sendall(draw.choice(GREETINGS) + draw.randbytes(draw.randrange(200)))
    return nothing


def flood(world: World, draw: random.Random) -> Heal:
    """One client sends 150 calls at once. Some are refused; others' wait."""
    connection = contextlib.ExitStack()
    client = connection.enter_context(world.client(direct=True))
    seconds = world.clocks.deadline_s

    def send() -> None:
        with contextlib.suppress(GriffinClientError):
            client.complete(token_ids=[7] * 50, max_tokens=2, ignore_eos=True, timeout=seconds)

    floods = [threading.Thread(target=send) for _ in range(150)]
    for thread in floods:
        thread.start()

    def heal() -> None:
        with connection:
            joining(floods)()

    return heal


def few_descriptors(world: World, draw: random.Random) -> Heal:
    """The decode server may open no further file while connections come and go."""
    import resource  # noqa: PLC0415

    pid, held = world.decode.pid, world.decode.holds()["descriptors"]
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (held + 2, usual[1]))
    host, _, port = world.decode.address.rpartition(":")
    raw = []
    for _ in range(20):
        with contextlib.suppress(OSError):
            raw.append(socket.create_connection((host, int(port)), timeout=1))

    def heal() -> None:
        for connection in raw:
            connection.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)

    return heal


def full_disk(world: World, draw: random.Random) -> Heal:
    """Neither server can write to a file, nor make shared memory."""
    import resource  # noqa: PLC0415

    pids = [server.pid for server in world.servers]
    usual = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids]
    for pid, (_, hard) in zip(pids, usual, strict=True):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))

    def heal() -> None:
        for pid, limits in zip(pids, usual, strict=True):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    return heal


def sockets_removed(world: World, draw: random.Random) -> Heal:
    """The files of the sockets for shared memory are gone."""
    moved = world.sockets.with_name("moved")
    os.rename(world.sockets, moved)

    def heal() -> None:
        with contextlib.suppress(OSError):
            os.rmdir(world.sockets)  # a server may have made it anew
        os.rename(moved, world.sockets)

    return heal


FAULTS = (
    Fault(name="prefill server killed (SIGKILL)", promise=ALL_GO_ON, inject=prefill_killed),
    Fault(name="prefill server told to end (SIGTERM)", promise=ALL_GO_ON, inject=prefill_ended),
    Fault(
        name="prefill server stopped (SIGSTOP)",
        promise=ALL_GO_ON + ", once pings are not answered",
        inject=prefill_stopped,
        lasts="pings",
    ),
    Fault(
        name="prefill server's engine stuck, its connection alive",
        promise=ALL_GO_ON + ", after --handoff-timeout-s",
        inject=prefill_jammed,
        lasts="handoff",
    ),
    Fault(
        name="connection to a prefill server cut",
        promise=ALL_GO_ON,
        inject=wire("prefill", Mode.CUT),
    ),
    Fault(
        name="connection to a prefill server slow",
        promise="every call ends well, later",
        inject=wire("prefill", Mode.DELAY),
    ),
    Fault(
        name="packets to and from a prefill server lost",
        promise=ALL_GO_ON + ", once pings are not answered",
        inject=wire("prefill", Mode.SWALLOW),
        lasts="pings",
    ),
    Fault(
        name="connection to a prefill server hangs",
        promise=ALL_GO_ON + ", once pings are not answered",
        inject=wire("prefill", Mode.HOLD),
        lasts="pings",
    ),
    *(
        Fault(name=f"handoff {name}", promise=ALL_GO_ON, inject=spoiled(how))
        for name, how in (
            ("truncated", spoiler.truncated),
            ("with a bit flipped", spoiler.corrupted),
            ("with two messages exchanged", spoiler.reordered),
            ("with a message doubled", spoiler.doubled),
            ("with a message missing", spoiler.missing),
            ("with NaN or infinity under a right checksum", spoiler.not_finite),
            ("with the header of another model, shape or version", spoiler.of_another),
            ("with a message far too large", spoiler.oversized),
            ("silent after some message, pings answered", spoiler.silent),
        )
    ),
    Fault(
        name="prefill server ends calls with words for the client",
        promise="the words reach no client; calls end well, or with the code's error",
        inject=spoiled(spoiler.rude),
        codes=frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}),
    ),
    Fault(name="decode server killed (SIGKILL)", promise=ENDS, inject=decode_killed, codes=LOST),
    Fault(
        name="decode server told to end (SIGTERM)",
        promise="calls go on for --shutdown-grace-s and end well, or with UNAVAILABLE; gRPC ends "
        "those that come in the last moment with CANCELLED",
        inject=decode_ended,
        codes=LOST | {"CANCELLED"},
    ),
    Fault(
        name="decode server stopped (SIGSTOP)",
        promise="clients' pings are not answered: calls end with UNAVAILABLE",
        inject=decode_stopped,
        lasts="pings",
        codes=LOST,
    ),
    Fault(
        name="decode server's engine stuck",
        promise="health says so after --stuck-after-s; when it is told to end, calls end with "
        "UNAVAILABLE, and it ends",
        inject=decode_jammed,
        codes=LOST,
    ),
    Fault(
        name="connections of clients cut",
        promise=ENDS,
        inject=wire("clients", Mode.CUT),
        codes=LOST,
    ),
    Fault(
        name="packets to and from clients lost",
        promise=ENDS + ", once pings are not answered",
        inject=wire("clients", Mode.SWALLOW),
        lasts="pings",
        codes=LOST,
    ),
    Fault(
        name="connections of clients hang",
        promise=ENDS + ", once pings are not answered",
        inject=wire("clients", Mode.HOLD),
        lasts="pings",
        codes=LOST,
    ),
    Fault(
        name="connections of clients slow",
        promise="every call ends well, later",
        inject=wire("clients", Mode.DELAY),
    ),
    Fault(name="clients hang up", promise="others' calls end well", inject=client_leaves),
    Fault(
        name="a client does not read",
        promise="it is ended after --reader-timeout-s; others' calls end well",
        inject=reader_stops,
    ),
    Fault(name="bytes that are no request", promise="others' calls end well", inject=malformed),
    Fault(
        name="150 calls of one client at once",
        promise="some are refused with a retry hint, and others' calls end well or are too",
        inject=flood,
        codes=frozenset({"RESOURCE_EXHAUSTED"}),
    ),
    Fault(
        name="no descriptors left on the decode server",
        promise="calls that have what they need end well, others with UNAVAILABLE or later",
        inject=few_descriptors,
        codes=FAILED_HANDOFF,
    ),
    Fault(
        name="no room for files or shared memory on either server",
        promise="KV goes in messages; every call ends well",
        inject=full_disk,
    ),
    Fault(
        name="directory of the handoff's sockets gone",
        promise="KV goes in messages; every call ends well",
        inject=sockets_removed,
    ),
)
"""All rows."""
