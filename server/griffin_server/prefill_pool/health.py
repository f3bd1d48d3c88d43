"""Whether a prefill server may be given prompts: it is ejected after a failure, and probed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from griffin.v1 import prefill_pb2 as pb
from griffin_server.prefill_pool.channel import PrefillChannel

log = structlog.get_logger("griffin.prefill")

PROBE_S = 0.5
"""Seconds between two health checks of an ejected server, and the timeout of each."""

PREFILL_SERVICE = pb.DESCRIPTOR.services_by_name["PrefillService"].full_name


class ServerHealth:
    """The health of one prefill server.

    Args:
        target: the server's address, for the log.
        channel: the channel to the server.
    """

    def __init__(self, target: str, channel: PrefillChannel) -> None:
        self._target = target
        self._channel = channel
        self._probe: asyncio.Task[None] | None = None
        self.ejected = False
        """Whether the server has failed and no health check has found it serving since."""

    def eject(self, rest_s: float) -> None:
        """Takes the server out of the pool until a health check says SERVING.

        Args:
            rest_s: seconds to wait before the first check.
        """
        if not self.ejected:
            self.ejected = True
            self._probe = asyncio.create_task(self._probe_until_serving(rest_s))

    async def close(self) -> None:
        """Stops probing."""
        if self._probe is not None:
            self._probe.cancel()
            with suppress(asyncio.CancelledError):
                await self._probe

    async def _probe_until_serving(self, rest_s: float) -> None:
        await asyncio.sleep(rest_s)
        request = health_pb2.HealthCheckRequest(service=PREFILL_SERVICE)
        while self.ejected:
            with suppress(grpc.aio.AioRpcError):
                stub: Any = health_pb2_grpc.HealthStub(self._channel.current)
                response = await stub.Check(request, timeout=PROBE_S)
                # gRPC gives None for bytes that it cannot parse.
                serving = health_pb2.HealthCheckResponse.SERVING
                self.ejected = response is None or response.status != serving
            if self.ejected:
                await asyncio.sleep(PROBE_S)
        log.info("prefill server is serving again", target=self._target)
