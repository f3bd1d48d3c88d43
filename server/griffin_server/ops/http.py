"""``/metrics``, ``/livez`` and ``/readyz`` over HTTP, on threads of their own."""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

log = structlog.get_logger("griffin.http")

Answer = Callable[[dict[str, Any], Any], Iterable[bytes]]

PATHS = ("/metrics", "/livez", "/readyz", "/healthz")
"""What is answered. Live is a server that answers at all; ready, one that takes calls. healthz is
readyz under the name that it had first."""

PLAIN = ("Content-Type", "text/plain; charset=utf-8")

SILENT_S = 30.0
"""How long a client may be silent within a request: each one holds a thread."""


class QuietHandler(WSGIRequestHandler):
    timeout = SILENT_S

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A WSGI server on a socket that listens already, of IPv4 or IPv6."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, answer: Answer) -> None:
        host, port, *_ = listening.getsockname()
        super().__init__((host, port), QuietHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.server_name, self.server_port = host, port
        self.setup_environ()
        self.set_app(answer)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or falls silent, as the checks of load balancers do, is no
        error."""
        if not isinstance(sys.exception(), OSError):
            log.exception("http request failed")


def _answer(get: Answer, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Answers GET as ``get`` does, HEAD with the same headers and no body, and no other method."""
    match environ["REQUEST_METHOD"]:
        case "GET":
            return get(environ, start_response)
        case "HEAD":
            said: list[tuple[str, list[tuple[str, str]]]] = []
            body = get({**environ, "REQUEST_METHOD": "GET"}, lambda *start: said.append(start))
            length = str(sum(map(len, body)))
            ((status, headers),) = said
            start_response(status, [*headers, ("Content-Length", length)])
            return []
    start_response("405 Method Not Allowed", [PLAIN, ("Allow", "GET, HEAD")])
    return [b"only GET and HEAD are answered\n"]


class HttpServer:
    """Answers scrapes and health checks until ``close``.

    Args:
        sockets: at least one, which listen already; it closes them.
        serving: whether the gRPC server takes calls.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        registry: CollectorRegistry,
        serving: Callable[[], bool],
    ) -> None:
        metrics: Answer = make_wsgi_app(registry)

        def get(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            match environ["PATH_INFO"]:
                case "/metrics":
                    return metrics(environ, start_response)
                case "/livez":
                    status, words = "200 OK", b"live\n"
                case "/readyz" | "/healthz":
                    status, words = (
                        ("200 OK", b"serving\n")
                        if serving()
                        else ("503 Service Unavailable", b"not serving\n")
                    )
                case _:
                    here = f"only {', '.join(PATHS)} are here\n"
                    status, words = "404 Not Found", here.encode()
            start_response(status, [PLAIN])
            return [words]

        self._servers = [_Server(listening, partial(_answer, get)) for listening in sockets]
        self._threads = [
            threading.Thread(target=server.serve_forever, name="griffin-http", daemon=True)
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stops listening."""
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
