"""One address of a server, with the gRPC services that are served there.

This module imports no torch; see ``listener``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from griffin_server.address import (
    Address,
    ListenError,
    TcpAddress,
    UnixAddress,
    address_of,
    listen,
)
from griffin_server.interceptors.chain import CallInterceptor
from griffin_server.rpc.reflection import add_reflection

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

Register = Callable[[Any], None]
"""Adds a service to a grpc.aio server."""


class Plane:
    """Listens once started. It cannot be started twice.

    Args:
        setting: the setting of the port, for errors.
        address: where to listen.
        services: by their names. Health and reflection are added.
        calls: the interceptor around the calls.
    """

    def __init__(
        self,
        setting: str,
        address: Address,
        services: Mapping[str, Register],
        calls: CallInterceptor,
    ) -> None:
        self.address = address
        """Once started, with the port that it listens on."""
        self.calls = calls
        self._setting = setting
        self._services = services
        self._health = health.HealthServicer()
        self._server: Any = None
        self._inode: tuple[int, int] | None = None  # of the Unix socket's file

    async def start(
        self,
        credentials: grpc.ServerCredentials | None,
        options: Sequence[tuple[str, Any]],
        most_calls: int,
    ) -> None:
        """Starts listening, NOT_SERVING.

        Args:
            credentials: None without TLS, which a Unix socket never has.
            options: of the gRPC server.
            most_calls: gRPC refuses more calls at once.

        Raises:
            ListenError: the address is in use or does not belong to this machine.
        """
        self._server = grpc.aio.server(
            interceptors=(self.calls,), options=options, maximum_concurrent_rpcs=most_calls
        )
        for register in self._services.values():
            register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_reflection((*self._services, HEALTH), self._server)
        await self.say(serving=False)
        self._add_ports(credentials)
        await self._server.start()

    async def say(self, *, serving: bool) -> None:
        """Sets what health answers."""
        status = health_pb2.HealthCheckResponse
        for name in ("", *self._services):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def say_goodbye(self) -> None:
        """Lets health say NOT_SERVING from now on."""
        await self._health.enter_graceful_shutdown()

    async def close(self, grace_s: float) -> None:
        """Stops listening, after calls that still run have got their final statuses. gRPC removes
        the file at a Unix socket's path, which may by then belong to another server."""
        if self._server is not None:
            with self._others_socket_kept():
                await self._server.stop(grace_s)

    def _others_socket_kept(self) -> AbstractContextManager[None]:
        if self._inode is None or not isinstance(self.address, UnixAddress):
            return nullcontext()
        return self.address.other_server_kept(self._inode)

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
            raise ListenError(self._setting, self.address, error) from error

    def _add_port(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        if credentials is None:
            return int(self._server.add_insecure_port(address))
        return int(self._server.add_secure_port(address, credentials))
