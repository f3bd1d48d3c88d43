"""Chooses a prefill server for each prompt, and retries once on another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import structlog

from griffin_core.engine.task import PrefillTask
from griffin_core.errors import (
    CapacityExhausted,
    EngineFault,
    FingerprintMismatch,
    GriffinError,
    HandoffError,
    ProtocolMismatch,
)
from griffin_core.forward.events import (
    PrefillEvent,
    PrefillRestarted,
)
from griffin_server.prefill_pool.client import PrefillClient

log = structlog.get_logger("griffin.prefill")

MISMATCH_S = 60.0
"""Seconds before a server that holds another model is probed: it says SERVING at once."""


class PrefillRouter:
    """Several prefill servers as one: each prompt goes to the server with the fewest tokens to run.

    A server that fails is ejected until a health check finds it serving. The prompt whose prefill
    failed is retried once on another server, if there is one and time is left.

    Args:
        clients: a client for each server, at least one.
    """

    def __init__(self, clients: Sequence[PrefillClient]) -> None:
        self.clients = clients

    async def stream(
        self, task: PrefillTask, timeout_s: float | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        """The events of a prefill, PrefillFinished last and verified. PrefillRestarted voids all
        events before it. Closing the iterator ends the call.

        Raises:
            GriffinError: the prefill did not finish.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        client = self._choose(self.clients)
        try:
            async with aclosing(client.stream(task, timeout_s)) as events:
                async for event in events:
                    yield event
            return
        except (HandoffError, EngineFault, CapacityExhausted) as error:
            self._mark_unhealthy(client, error)
            others = [other for other in self.clients if other is not client]
            left_s = None if deadline is None else deadline - time.monotonic()
            if not others or (left_s is not None and left_s <= 0):
                raise
            log.warning("prefill retried", failed=client.target, error=str(error))
        yield PrefillRestarted()
        client = self._choose(others)
        try:
            async with aclosing(client.stream(task, left_s)) as events:
                async for event in events:
                    yield event
        except (HandoffError, EngineFault) as error:
            self._mark_unhealthy(client, error)
            raise

    async def close(self) -> None:
        """Closes all clients."""
        await asyncio.gather(*(client.close() for client in self.clients))

    @staticmethod
    def _choose(clients: Sequence[PrefillClient]) -> PrefillClient:
        """The least busy of the healthy servers; if none is healthy, of all."""
        healthy = [client for client in clients if not client.health.ejected]
        return min(healthy or clients, key=lambda client: client.outstanding_tokens)

    @staticmethod
    def _mark_unhealthy(client: PrefillClient, error: GriffinError) -> None:
        """Ejects a server, unless it was only full."""
        if not isinstance(error, CapacityExhausted):
            mismatch = isinstance(error, FingerprintMismatch | ProtocolMismatch)
            client.health.eject(MISMATCH_S if mismatch else 0.0)
