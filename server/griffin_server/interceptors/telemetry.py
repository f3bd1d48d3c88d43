"""Counts, traces and logs every call."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from griffin_server.interceptors.call import Call
from griffin_server.telemetry.audit import Audit, audit_var
from griffin_server.telemetry.metrics import Metrics

if TYPE_CHECKING:  # it brings torch, and the server listens before that is imported
    from griffin_server.telemetry.tracing import Tracing

log = structlog.get_logger("griffin.rpc")


class CallTelemetry:
    """Metrics, a span and one log line for each call.

    Args:
        metrics: the server's metrics.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.tracing: Tracing | None = None
        """Set once the model is loaded; earlier calls have no span."""

    @asynccontextmanager
    async def observe(self, call: Call) -> AsyncIterator[None]:
        """Observes a call from its arrival until its status is sent."""
        clock = time.perf_counter()
        peer = call.context.peer()  # gRPC crashes if it is asked once the call is over
        audited = Audit(request_bytes=len(call.request))
        audit_var.set(audited)
        call.counts = self._metrics.grpc_call(call.kind, call.method)
        if self.tracing is not None:
            call.spans = self.tracing.call(call.method, call.context.invocation_metadata())
        try:
            yield
        finally:
            seconds = time.perf_counter() - clock
            call.counts.handled(call.code, seconds)
            if call.spans is not None:
                call.spans.end(call.code)
            log.info(
                "call",
                method=call.method,
                code=call.code,
                seconds=round(seconds, 6),
                principal=(call.principal and call.principal.name) or None,
                peer=peer,
                **audited.known(),
            )
