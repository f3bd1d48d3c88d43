"""Traces for OpenTelemetry: a span for each call, with a child span for each of its phases.

The core knows nothing about tracing: spans are made from the durations in its events. They are sent
to the receiver that OpenTelemetry's environment variables name. Without one, OpenTelemetry's SDK is
not imported.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias

import structlog
from opentelemetry.trace import NoOpTracer, Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from griffin_core.engine.events import (
    Admitted,
    Event,
    Finished,
    PrefillBegun,
    PrefillStreamEvent,
    Started,
)
from griffin_core.forward.events import (
    PrefillFinished,
)
from griffin_server import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

log = structlog.get_logger("griffin.tracing")

Metadata: TypeAlias = "tuple[tuple[str, str], ...]"

FLUSH_S = 5.0
"""Seconds that a stopping server tries to send its last spans."""

FAULTS = {
    "UNKNOWN",
    "DEADLINE_EXCEEDED",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
}
"""The status codes of server errors, by OpenTelemetry's conventions for gRPC."""

W3C = TraceContextTextMapPropagator()


class Tracing:
    """Sends a server's spans to an OTLP receiver, if one is configured.

    Args:
        role: names the service if OTEL_SERVICE_NAME is not set.
    """

    def __init__(self, role: str) -> None:
        self._sending: tuple[TracerProvider, SpanExporter] | None = None
        if _asked_for():
            try:
                self._sending = _start_sending(f"griffin-{role}")
            except Exception as error:  # the SDK raises several kinds for bad values
                log.warning("no traces: OTEL_* variables", error=str(error))
        self._tracer: Tracer = NoOpTracer()
        if self._sending:
            self._tracer = self._sending[0].get_tracer("griffin_server", __version__)

    @property
    def sending(self) -> bool:
        """Whether spans are sent to a receiver."""
        return self._sending is not None

    def call(self, method: str, metadata: Any) -> CallSpans:
        """Starts the span of a call and sets ``spans_var`` to it.

        Args:
            method: "/package.Service/Method".
            metadata: the call's metadata, which may name a parent span.
        """
        spans = CallSpans(self._tracer, method.lstrip("/"), dict(metadata or ()))
        spans_var.set(spans)
        return spans

    def close(self) -> None:
        """Sends the spans that have not been sent yet."""
        if self._sending is None:
            return
        provider, exporter = self._sending
        give_up = threading.Timer(FLUSH_S, exporter.shutdown)
        give_up.start()
        provider.shutdown()
        give_up.cancel()


class CallSpans:
    """The spans of one call: its own, those of its phases, one after the other, and parts of these.

    Times are on ``time.monotonic``, as in the core.

    Args:
        method: "package.Service/Method".
        metadata: the call's metadata, which may name a parent span.
    """

    def __init__(self, tracer: Tracer, method: str, metadata: Mapping[str, Any]) -> None:
        self._tracer = tracer
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        self._call = tracer.start_span(
            method,
            W3C.extract(metadata),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": method},
        )
        self._phase: Span | None = None
        self._began = 0.0  # when the current phase began
        self._handed_over = False  # whether a prefill server runs the prompt

    def note(self, **attributes: str | float) -> None:
        """Sets attributes of the call's span."""
        self._call.set_attributes({f"griffin.{name}": value for name, value in attributes.items()})

    def queued(self, arrived: float) -> None:
        """Starts the phase in which the call waits for the engine."""
        self._next("queue", arrived)

    def take(self, event: Event | PrefillStreamEvent) -> None:
        """Updates the spans by an event of the engine."""
        match event:
            case Admitted() | PrefillBegun():
                self._next("prefill", self._began + event.queue_s)
            case Started():
                self.note(prompt_tokens=event.prompt_tokens, density=event.pruning.density)
                prefilled = self._began + event.prefill_s
                if not self._handed_over:  # otherwise the prefill server's trace has it
                    self._part("selection", prefilled - event.selection_s, prefilled)
                self._next("decode", prefilled)
            case PrefillFinished():
                now = time.monotonic()
                self._part("selection", now - event.selection_s, now)
                self._end_phase(now)
            case Finished(timings=timings):
                self.note(
                    generated_tokens=event.generated_tokens, finish_reason=event.reason.name.lower()
                )
                if timings.slim_build_s:
                    self._part("slim build", self._began, self._began + timings.slim_build_s)
                first_token_s = timings.first_token_s - timings.queue_s - timings.prefill_s
                self._end_phase(self._began + first_token_s + timings.decode_s)

    @contextmanager
    def handoff(self, target: str) -> Iterator[Metadata]:
        """A span around pulling a prefill. Yields metadata that makes it the parent of the span of
        the prefill server."""
        self._handed_over = True
        span = self._start("handoff", time.monotonic(), SpanKind.CLIENT)
        span.set_attribute("griffin.prefill_target", target)
        carrier: dict[str, str] = {}
        W3C.inject(carrier, set_span_in_context(span))
        try:
            yield tuple(carrier.items())
        except Exception as error:
            span.set_status(StatusCode.ERROR, str(error))
            raise
        finally:
            span.end(self._ns(time.monotonic()))

    def end(self, code: str) -> None:
        """Ends the call's span and the current phase's.

        Args:
            code: the name of the call's status code.
        """
        self._call.set_attribute("rpc.response.status_code", code)
        if code in FAULTS:
            self._call.set_attribute("error.type", code)
            for span in (self._phase, self._call):
                if span is not None:
                    span.set_status(StatusCode.ERROR)
        now = time.monotonic()
        self._end_phase(now)
        self._call.end(self._ns(now))

    def _next(self, phase: str, at: float) -> None:
        self._end_phase(at)
        self._phase = self._start(phase, at)
        self._began = at

    def _end_phase(self, at: float) -> None:
        if self._phase is not None:
            self._phase.end(self._ns(at))
            self._phase = None

    def _part(self, name: str, begin: float, end: float) -> None:
        """Adds a child span of the current phase."""
        self._start(name, max(begin, self._began)).end(self._ns(end))

    def _start(self, name: str, at: float, kind: SpanKind = SpanKind.INTERNAL) -> Span:
        """Starts a child span of the current phase, or of the call without one."""
        parent = set_span_in_context(self._phase or self._call)
        return self._tracer.start_span(name, parent, kind, start_time=self._ns(at))

    def _ns(self, at: float) -> int:
        return self._epoch_ns + int(at * 1e9)


_OFF = CallSpans(NoOpTracer(), "none", {})

spans_var: ContextVar[CallSpans] = ContextVar("spans", default=_OFF)
"""The spans of the call that is being served."""


def _asked_for() -> bool:
    """Whether the environment asks for spans by a protocol that is supported here."""

    def setting(*names: str) -> str:
        values = (os.environ.get(name, "").strip().lower() for name in names)
        return next(filter(None, values), "")

    if setting("OTEL_SDK_DISABLED") == "true":
        return False
    endpoint = setting("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    exporter = setting("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    protocol = setting("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    if exporter == "none":
        return False
    if exporter != "otlp" or protocol not in ("", "grpc"):
        log.warning(
            "no traces: only otlp over grpc is supported",
            exporter=exporter,
            protocol=protocol,
        )
        return False
    return True


def _start_sending(service: str) -> tuple[TracerProvider, SpanExporter]:
    """Starts an exporter. The environment sets its sampler, receiver and limits."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    named = OTELResourceDetector().detect().attributes
    resource = Resource.create({"service.name": service, "service.version": __version__, **named})
    exporter = OTLPSpanExporter()
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider, exporter
