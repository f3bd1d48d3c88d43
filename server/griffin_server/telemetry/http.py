"""An HTTP server for ``/metrics``, ``/livez`` and ``/readyz``, or only for the last two, on its own
threads."""

from __future__ import annotations

import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

from griffin_server.security.files import WatchedFiles

log = structlog.get_logger("griffin.http")

Answer = Callable[[dict[str, Any], Any], Iterable[bytes]]

PATHS = ("/metrics", "/livez", "/readyz", "/healthz")
"""The paths that exist. A server is live unless its engine is stuck, and ready if it admits calls.
``/healthz`` is the older name of ``/readyz``."""

OK, UNAVAILABLE = "200 OK", "503 Service Unavailable"

PLAIN = ("Content-Type", "text/plain; charset=utf-8")

SILENT_S = 30.0
"""Seconds after which a client that is silent within a request is dropped, because each client
holds a thread."""


MOST_CONNECTIONS = 32
"""The most clients at once, on each address. The one that came first gives way to one more."""


class QuietHandler(WSGIRequestHandler):
    timeout = SILENT_S

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A WSGI server on an IPv4 or IPv6 socket that listens already."""

    daemon_threads = True

    def __init__(
        self, listening: socket.socket, answer: Answer, tls: WatchedFiles[ssl.SSLContext] | None
    ) -> None:
        self._tls = tls
        host, port, *_ = listening.getsockname()
        super().__init__((host, port), QuietHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.server_name, self.server_port = host, port
        self._lock = threading.Lock()
        self._clients: dict[Any, None] = {}  # their sockets, in order of arrival
        self.setup_environ()
        self.set_app(answer)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self._tls is not None:
            # The handshake comes with the first read, which is on the client's own thread.
            connection = self._tls.value.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._clients[request] = None
            first = next(iter(self._clients)) if len(self._clients) > MOST_CONNECTIONS else None
            if first is not None:
                del self._clients[first]
        if first is not None:
            with suppress(OSError):  # it has ended by itself
                first.shutdown(socket.SHUT_RDWR)  # its thread then ends
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs errors, but not clients that disconnect or fall silent, as load balancers' checks
        do."""
        if not isinstance(sys.exception(), OSError):
            log.exception("http request failed")


def _answer(get: Answer, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Answers GET by ``get``, HEAD with the same headers but no body, and other methods by 405."""
    match environ["REQUEST_METHOD"]:
        case "GET":
            return get(environ, start_response)
        case "HEAD":
            started: list[tuple[str, list[tuple[str, str]]]] = []
            body = get({**environ, "REQUEST_METHOD": "GET"}, lambda *start: started.append(start))
            length = str(sum(map(len, body)))
            ((status, headers),) = started
            start_response(status, [*headers, ("Content-Length", length)])
            return []
    start_response("405 Method Not Allowed", [PLAIN, ("Allow", "GET, HEAD")])
    return [b"only GET and HEAD are allowed\n"]


class HttpServer:
    """Answers scrapes and health checks until ``close``.

    Args:
        sockets: at least one listening socket; ``close`` closes them.
        registry: the metrics; None serves none.
        serving: returns whether the gRPC server admits calls.
        live: returns whether the process can still do its work.
        tls: None without TLS.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        registry: CollectorRegistry | None,
        *,
        serving: Callable[[], bool],
        live: Callable[[], bool],
        tls: WatchedFiles[ssl.SSLContext] | None = None,
    ) -> None:
        metrics: Answer | None = make_wsgi_app(registry) if registry is not None else None
        paths = PATHS if metrics else PATHS[1:]

        def get(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            match environ["PATH_INFO"]:
                case "/metrics" if metrics is not None:
                    return metrics(environ, start_response)
                case "/livez":
                    status, body = (OK, b"live\n") if live() else (UNAVAILABLE, b"stuck\n")
                case "/readyz" | "/healthz":
                    ready = serving() and live()
                    status, body = (OK, b"serving\n") if ready else (UNAVAILABLE, b"not serving\n")
                case _:
                    status = "404 Not Found"
                    body = f"only {', '.join(paths)} exist\n".encode()
            start_response(status, [PLAIN])
            return [body]

        self._servers = [_Server(listening, partial(_answer, get), tls) for listening in sockets]
        self._threads = [
            threading.Thread(target=server.serve_forever, name="griffin-http", daemon=True)
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stops listening, and closes the sockets."""
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
