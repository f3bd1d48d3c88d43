"""The gRPC and HTTP servers, which listen before the model is loaded and close after draining.

Clients and decode servers come to addresses of their own: the public plane and the internal one.

This module imports no torch, because that takes seconds and health checks must be answered sooner.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from griffin.v1 import generation_pb2, generation_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from griffin_server.address import Address, ListenError, TcpAddress, UnixAddress, listen, parse_host
from griffin_server.connections import default_request_bytes, server_options
from griffin_server.interceptors.chain import CallInterceptor
from griffin_server.interceptors.drain import Drain
from griffin_server.plane import Plane
from griffin_server.security.identity import Callers, Peers
from griffin_server.security.tls import scrape_context, server_credentials
from griffin_server.settings import Settings
from griffin_server.telemetry.http import HttpServer
from griffin_server.telemetry.metrics import Metrics
from griffin_server.transfer.descriptors import handoff_directory

if TYPE_CHECKING:
    from griffin_server.telemetry.tracing import Tracing

log = structlog.get_logger("griffin.listener")

STATUSES_S, WATCHERS_S = 5.0, 2.0
"""The grace for sending final statuses: with calls that still run, and with none, where only
watchers of health are left."""

MORE_CALLS = 1024
"""The calls at once, besides those that run and wait in the engine, above which gRPC refuses."""

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
PREFILL = prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name


class Later:
    """Stands for a servicer until the model is loaded. The interceptor admits no call before."""

    def __init__(self) -> None:
        self.servicer: Any = None

    def __getattr__(self, method: str) -> Any:
        return partial(self._call, method)

    def _call(self, method: str, request: Any, context: Any) -> Any:
        return getattr(self.servicer, method)(request, context)


class Listener:
    """Listens once started, and admits calls once opened. It cannot be started twice.

    Raises:
        BadSecurityFile: a file with keys cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.metrics = Metrics()
        self.drain = Drain()
        self.started = False
        self.stuck = False
        """Whether the engine is stuck; see ``set_stuck``."""
        self.handoff_directory: Path | None = None
        """The directory of the sockets over which shared memory comes; None for no such memory."""
        self._generation, self._prefill = Later(), Later()
        self._http: list[HttpServer] = []
        self._planes = self._make_planes()

    def _make_planes(self) -> list[Plane]:
        settings, planes = self._settings, []
        call = partial(
            CallInterceptor, self.metrics, drain=self.drain, max_call_s=settings.max_call_s
        )
        if settings.role != "prefill":
            register = partial(
                generation_pb2_grpc.add_GenerationServiceServicer_to_server,
                self._generation,  # type: ignore[arg-type]  # stands for one
            )
            planes.append(
                Plane("port", settings.address, {GENERATION: register}, call(Callers(settings)))
            )
        if settings.prefill_address is not None:
            register = partial(
                prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
                self._prefill,  # type: ignore[arg-type]
            )
            port = "port" if settings.role == "prefill" else "prefill_port"
            planes.append(
                Plane(port, settings.prefill_address, {PREFILL: register}, call(Peers(settings)))
            )
        return planes

    @property
    def address(self) -> Address:
        """The address of the gRPC server; once started, with the port that it listens on."""
        return self._planes[0].address

    @property
    def prefill_address(self) -> Address | None:
        """The same for PrefillService; None if it is not served."""
        return None if self._settings.prefill_address is None else self._planes[-1].address

    async def start(self) -> None:
        """Starts listening. Until ``open``, calls end with UNAVAILABLE and health is NOT_SERVING.

        Raises:
            ListenError: an address is in use or does not belong to this machine.
            BadSecurityFile: a file with certificates, or handoff_dir, cannot be used.
        """
        self.started = True
        settings = self._settings
        credentials = server_credentials(settings)
        if settings.prefill_target or settings.prefill_address is not None:
            self.handoff_directory = handoff_directory(settings)
        self._start_http()
        calls = settings.max_sessions + settings.max_queue
        options = server_options(settings.max_request_bytes, settings.max_call_s, calls)
        for plane in self._planes:
            await plane.start(credentials, options, calls + MORE_CALLS)
        if settings.insecure:
            log.warning(
                "insecure: whoever reaches the port may use it",
                address=str(self.address),
                tls=credentials is not None,
                asks_who_calls=settings.asks_who_calls,
            )

    def _start_http(self) -> None:
        settings = self._settings
        for name, registry, tls in (
            ("metrics_port", self.metrics.registry, scrape_context(settings)),
            ("health_port", None, None),
        ):
            if not (port := getattr(settings, name)):
                continue
            where = _http_address(settings, port)
            try:
                sockets = listen(where)
            except OSError as error:
                raise ListenError(name, where, error) from error
            self._http.append(
                HttpServer(
                    sockets,
                    registry,
                    serving=lambda: self.drain.serving,
                    live=lambda: not self.stuck,
                    tls=tls,
                )
            )

    async def open(
        self, *, generation: Any, prefill: Any, tracing: Tracing, context_length: int
    ) -> None:
        """Admits calls, and reports SERVING.

        Args:
            generation, prefill: the servicers; None for one that is not served.
            context_length: of the model; it bounds requests.
        """
        self._generation.servicer, self._prefill.servicer = generation, prefill
        most = self._settings.max_request_bytes or default_request_bytes(context_length)
        for plane in self._planes:
            plane.calls.open(tracing, most, context_length)
        for plane in self._planes:
            await plane.say(serving=True)

    async def set_stuck(self, stuck: bool) -> None:
        """Reports NOT_SERVING, and neither live nor ready, while the engine is stuck."""
        if stuck != self.stuck and self.drain.serving:
            self.stuck = stuck
            for plane in self._planes:
                await plane.say(serving=not stuck)

    async def stop_serving(self, grace_s: float) -> None:
        """Reports NOT_SERVING, refuses new calls, and waits until the running ones have ended or
        the grace is over."""
        for plane in self._planes:
            await plane.say_goodbye()
        await self.drain.drain(grace_s)

    async def close(self) -> None:
        """Stops listening, after calls that still run have got their final statuses."""
        for http in self._http:
            await asyncio.to_thread(http.close)
        # A watch of health never ends by itself.
        grace_s = STATUSES_S if self.drain.active else WATCHERS_S
        await asyncio.gather(*(plane.close(grace_s) for plane in self._planes))


def _http_address(settings: Settings, port: int) -> TcpAddress:
    """The address for HTTP: on metrics_host, else on host, else on localhost for a Unix socket."""
    where = parse_host(settings.metrics_host or settings.host, port)
    if isinstance(where, UnixAddress):
        return TcpAddress(host="localhost", port=port)
    return where
