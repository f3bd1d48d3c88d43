"""What listens beside gRPC, and clients that do not behave."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import threading
from collections.abc import Iterator
from itertools import product

import pytest
from prometheus_client import CollectorRegistry, Gauge

from griffin_server.address import TcpAddress, listen
from griffin_server.telemetry import http as ops_http
from griffin_server.telemetry.http import PATHS, HttpServer
from tests.servers import eventually

RESET = struct.pack("ii", 1, 0)
"""For SO_LINGER: closing sends RST, as the checks of some load balancers do."""


@pytest.fixture
def serving() -> list[bool]:
    return [True]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch, serving: list[bool]) -> Iterator[int]:
    monkeypatch.setattr(ops_http.QuietHandler, "timeout", 0.2)
    sockets = listen(TcpAddress(host="127.0.0.1", port=0))
    registry = CollectorRegistry()
    Gauge("griffin_test", "A number.", registry=registry)
    port = int(sockets[0].getsockname()[1])
    server = HttpServer(sockets, registry, serving=lambda: serving[0], live=lambda: True)
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


def test_clients_that_hang_on_give_way(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither threads nor descriptors pile up, and probes are answered meanwhile."""
    monkeypatch.setattr(ops_http.QuietHandler, "timeout", 60.0)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    clients = []
    for number in range(4 * ops_http.MOST_CONNECTIONS):
        clients.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        if number % 16 == 0:
            assert asked(port, "GET", "/readyz")[0] == 200
    assert asked(port, "GET", "/livez")[0] == 200
    most = ops_http.MOST_CONNECTIONS + 2
    eventually(lambda: threading.active_count() - threads <= most)
    # Each client's own end is a descriptor of this process too.
    eventually(lambda: len(os.listdir("/proc/self/fd")) - descriptors <= len(clients) + most)
    for client in clients[: -ops_http.MOST_CONNECTIONS]:
        assert client.recv(1) == b""
    for client in clients:
        client.close()


def asked(port: int, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path, headers={"Accept-Encoding": "identity"})
    answer = connection.getresponse()
    unlike = {"date", "content-length"}
    headers = {k.lower(): v for k, v in answer.getheaders() if k.lower() not in unlike}
    body = answer.read()
    if method == "HEAD":
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
            raw = b"".join(iter(lambda: client.recv(4096), b""))
        assert raw.endswith(b"\r\n\r\n")
        return answer.status, headers, b"." * int(answer.headers["Content-Length"])
    return answer.status, headers, body


def test_head_is_answered_as_get_without_a_body(serving: list[bool], port: int) -> None:
    always = {"/livez": 200, "/metrics": 200, "/": 404, "/other": 404}
    for serving[0], path in product((True, False), (*PATHS, "/", "/other")):
        status, headers, body = asked(port, "GET", path)
        assert status == always.get(path, 200 if serving[0] else 503)
        assert asked(port, "HEAD", path) == (status, headers, b"." * len(body))


def test_other_methods_are_not_allowed(port: int) -> None:
    methods = ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")
    for method, path in product(methods, (*PATHS, "/other")):
        status, headers, body = asked(port, method, path)
        assert (status, headers["allow"]) == (405, "GET, HEAD")
        assert body == b"only GET and HEAD are allowed\n"
