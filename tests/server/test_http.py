"""What listens beside gRPC, and clients that do not behave."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from griffin_server.ops import http
from griffin_server.ops.address import TcpAddress, listen
from griffin_server.ops.http import HttpServer

RESET = struct.pack("ii", 1, 0)
"""For SO_LINGER: closing sends RST, as the checks of some load balancers do."""


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(http._Quiet, "timeout", 0.2)
    sockets = listen(TcpAddress(host="127.0.0.1", port=0))
    port = int(sockets[0].getsockname()[1])
    server = HttpServer(sockets, CollectorRegistry(), lambda: True)
    yield port
    server.close()


@pytest.mark.parametrize("begun", [b"", b"GET /liv", b"GET /livez HTTP/1.1\r\nHost:"])
def test_a_client_that_hangs_up_leaves_no_traceback(
    port: int, begun: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(begun)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.0 200")
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("begun", [b"", b"GET /liv", b"GET /livez HTTP/1.1\r\nHost:"])
def test_a_client_that_falls_silent_is_hung_up_on(
    port: int, begun: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(begun)
        assert client.recv(100) == b""
    assert "Traceback" not in "".join(capfd.readouterr())
