"""Connections are kept: bare HTTP/2 clients that ping, and what each side asks of the other."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from griffin_client.channel import CHANNEL_OPTIONS
from griffin_core.model.load import Model
from griffin_server import connections
from griffin_server.connections import (
    LEAST_PING_INTERVAL_MS,
    PREFILL_CHANNEL_OPTIONS,
    server_options,
)
from tests.servers import running

SETTINGS, PING, GOAWAY = 4, 6, 7
ACK = 1


class BareClient:
    """An HTTP/2 connection without a stream, by RFC 9113."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), 10)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._send(SETTINGS, 0)

    def _send(self, kind: int, flags: int, payload: bytes = b"") -> None:
        header = struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + bytes(4)
        self._socket.sendall(header + payload)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += (more := self._socket.recv(size - len(data)))
            if not more:
                raise ConnectionError("closed")
        return data

    def ping(self) -> bytes | None:
        """None if it is answered, else the words of the GOAWAY."""
        self._send(PING, 0, b"griffin!")
        while True:
            length, kind, flags = struct.unpack(">IBB", b"\0" + self._read(5))
            self._read(4)
            payload = self._read(length)
            if kind == SETTINGS and not flags & ACK:
                self._send(SETTINGS, ACK)
            elif kind == PING and flags & ACK:
                return None
            elif kind == GOAWAY:
                return payload[8:]

    def close(self) -> None:
        self._socket.close()


@contextmanager
def bare_client(target: str) -> Iterator[BareClient]:
    client = BareClient(target)
    try:
        yield client
    finally:
        client.close()


def pinged(client: BareClient, times: int, interval_s: float) -> list[bytes | None]:
    answers = []
    for _ in range(times):
        answers.append(client.ping())
        if answers[-1] is not None:
            break
        time.sleep(interval_s)  # what is tested is how time passes
    return answers


@pytest.mark.parametrize("role", ["all", "prefill"])
def test_an_idle_client_may_ping_as_often_as_it_is_allowed(
    role: str, tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LEAST_PING_INTERVAL_MS", 50)
    with running(tiny("llama"), role=role) as server, bare_client(server.target) as client:
        assert pinged(client, 10, 0.07) == [None] * 10


def test_a_client_that_floods_is_thrown_out(tiny: Callable[[str], Model]) -> None:
    with running(tiny("llama")) as server, bare_client(server.target) as client:
        assert pinged(client, 10, 0)[-1] == b"too_many_pings"


@pytest.mark.e2e
def test_an_idle_client_of_grpc_go_stays(tiny: Callable[[str], Model]) -> None:
    """Its least Time is 10 s; the fourth ping ended the connection when two hours were asked."""
    with running(tiny("llama")) as server, bare_client(server.target) as client:
        assert pinged(client, 6, 10) == [None] * 6


def test_nobody_of_ours_pings_more_often_than_a_server_allows() -> None:
    assert dict(server_options(1024, 60, 8))["grpc.keepalive_permit_without_calls"] == 1
    assert (
        dict(server_options(1024, 60, 8))["grpc.http2.min_ping_interval_without_data_ms"] == 5_000
    )
    for options in (PREFILL_CHANNEL_OPTIONS, CHANNEL_OPTIONS):
        mine = dict(options)
        assert mine["grpc.keepalive_time_ms"] >= 2 * LEAST_PING_INTERVAL_MS
        assert mine["grpc.keepalive_permit_without_calls"] == 1
        assert mine["grpc.keepalive_timeout_ms"] <= mine["grpc.keepalive_time_ms"]
