"""Passes the caller's trace on to the server, where the caller traces with OpenTelemetry."""

from __future__ import annotations

import sys


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """The caller's current span as gRPC metadata (W3C Trace Context); empty without a span.

    The client does not depend on OpenTelemetry: a program that has a current span has imported it.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
        TraceContextTextMapPropagator,
    )

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())
