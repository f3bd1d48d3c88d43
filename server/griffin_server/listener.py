"""The gRPC and HTTP servers, which listen before the model is loaded and close after draining.

This module imports no torch, because that takes seconds and health checks must be answered sooner.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from griffin.v1 import generation_pb2, generation_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from griffin_server.address import (
    Address,
    ListenError,
    TcpAddress,
    UnixAddress,
    address_of,
    listen,
    parse_host,
)
from griffin_server.connections import default_request_bytes, server_options
from griffin_server.interceptors.chain import CallInterceptor
from griffin_server.rpc.reflection import add_reflection
from griffin_server.security.identity import Identity
from griffin_server.security.tls import server_credentials
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

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
PREFILL = prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


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
        self.calls = CallInterceptor(self.metrics, Identity(settings))
        self.address: Address = parse_host(settings.host, settings.port)
        """The address of the gRPC server; once started, with the port that it listens on."""
        self.started = False
        self.stuck = False
        """Whether the engine is stuck; see ``set_stuck``."""
        self.handoff_directory: Path | None = None
        """The directory of the sockets over which shared memory comes; None for no such memory."""
        self._inode: tuple[int, int] | None = None  # of the Unix socket's file
        self._generation, self._prefill = Later(), Later()
        self._health = health.HealthServicer()
        self._http: HttpServer | None = None
        self._server: Any = None

    async def start(self) -> None:
        """Starts listening. Until ``open``, calls end with UNAVAILABLE and health is NOT_SERVING.

        Raises:
            ListenError: an address is in use or does not belong to this machine.
            BadSecurityFile: a file with certificates, or handoff_dir, cannot be used.
        """
        self.started = True
        settings = self._settings
        credentials = server_credentials(settings)
        self.handoff_directory = handoff_directory(settings)
        self._server = grpc.aio.server(
            interceptors=(self.calls,), options=server_options(settings.max_request_bytes)
        )
        if GENERATION in self._services:
            generation_pb2_grpc.add_GenerationServiceServicer_to_server(
                self._generation,  # type: ignore[arg-type]  # stands for one
                self._server,
            )
        if PREFILL in self._services:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(
                self._prefill,  # type: ignore[arg-type]
                self._server,
            )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_reflection((*self._services, HEALTH), self._server)
        for name in ("", *self._services):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        if settings.metrics_port:
            where = _metrics_address(settings)
            try:
                sockets = listen(where)
            except OSError as error:
                raise ListenError("metrics_port", where, error) from error
            self._http = HttpServer(
                sockets,
                self.metrics.registry,
                lambda: self.calls.drain.serving,
                lambda: not self.stuck,
            )
        self._add_ports(credentials)
        if settings.insecure:
            log.warning(
                "insecure: whoever reaches the port may use it",
                address=str(self.address),
                tls=credentials is not None,
                asks_who_calls=settings.asks_who_calls,
            )
        await self._server.start()

    async def open(
        self, *, generation: Any, prefill: Any, tracing: Tracing, context_length: int
    ) -> None:
        """Admits calls, and reports SERVING.

        Args:
            generation, prefill: the servicers; None for one that the role does not have.
            context_length: of the model; it bounds requests.
        """
        self._generation.servicer, self._prefill.servicer = generation, prefill
        most = self._settings.max_request_bytes or default_request_bytes(context_length)
        self.calls.open(tracing, most, context_length)
        for name in ("", *self._services):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def set_stuck(self, stuck: bool) -> None:
        """Reports NOT_SERVING, and neither live nor ready, while the engine is stuck."""
        if stuck != self.stuck and self.calls.drain.serving:
            self.stuck = stuck
            status = health_pb2.HealthCheckResponse
            for name in ("", *self._services):
                await self._health.set(name, status.NOT_SERVING if stuck else status.SERVING)

    async def drain(self, grace_s: float) -> None:
        """Reports NOT_SERVING, refuses new calls, and waits until the running ones have ended or
        the grace is over."""
        await self._health.enter_graceful_shutdown()
        await self.calls.drain.drain(grace_s)

    async def close(self) -> None:
        """Stops listening, after calls that still run have got their final statuses. gRPC removes
        the file at a Unix socket's path, which may by then belong to another server."""
        if self._http is not None:
            await asyncio.to_thread(self._http.close)
        if self._server is not None:
            # A watch of health never ends by itself.
            grace_s = STATUSES_S if self.calls.drain.active else WATCHERS_S
            with self._others_socket_kept():
                await self._server.stop(grace_s)

    def _others_socket_kept(self) -> AbstractContextManager[None]:
        if self._inode is None or not isinstance(self.address, UnixAddress):
            return nullcontext()
        return self.address.other_server_kept(self._inode)

    @property
    def _services(self) -> list[str]:
        """The names of the role's services."""
        of_role = {"all": [GENERATION, PREFILL], "decode": [GENERATION], "prefill": [PREFILL]}
        return of_role[self._settings.role]

    def _add_ports(self, credentials: grpc.ServerCredentials | None) -> None:
        try:
            match self.address:
                case UnixAddress():
                    self.address.claim()
                    self._server.add_insecure_port(str(self.address))
                    self._inode = self.address.inode
                    self.address.open_to_group()
                case TcpAddress(port=port):
                    hosts = []
                    for probe in listen(self.address):  # its errors say why; gRPC's do not
                        with probe:
                            hosts.append(address_of(probe))
                    for host in hosts:
                        port = self._add_port(str(replace(host, port=port)), credentials)
                    self.address = replace(self.address, port=port)
        except (OSError, RuntimeError) as error:
            raise ListenError("port", self.address, error) from error

    def _add_port(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        if credentials is None:
            return int(self._server.add_insecure_port(address))
        return int(self._server.add_secure_port(address, credentials))


def _metrics_address(settings: Settings) -> TcpAddress:
    """The address for HTTP: on metrics_host, else on host, else on localhost for a Unix socket."""
    where = parse_host(settings.metrics_host or settings.host, settings.metrics_port)
    if isinstance(where, TcpAddress):
        return where
    return TcpAddress(host="localhost", port=settings.metrics_port)
