"""``/metrics`` and ``/healthz`` over HTTP, on a thread of their own."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class HttpServer:
    """Answers scrapes and health checks until ``close``.

    Args:
        port: 0 for any that is free.
        serving: whether the gRPC server takes calls.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, serving: Callable[[], bool]
    ) -> None:
        metrics: Callable[[dict[str, Any], Any], Iterable[bytes]] = make_wsgi_app(registry)

        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            match environ["PATH_INFO"]:
                case "/metrics":
                    return metrics(environ, start_response)
                case "/healthz":
                    status, words = (
                        ("200 OK", b"serving\n")
                        if serving()
                        else ("503 Service Unavailable", b"not serving\n")
                    )
                case _:
                    status, words = "404 Not Found", b"only /metrics and /healthz are here\n"
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [words]

        self._server = make_server(host, port, answer, _Server, _Quiet)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="griffin-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
