"""A receiver of traces, as OpenTelemetry's exporters send them by gRPC."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage


@dataclass(frozen=True, kw_only=True)
class Span:
    """What came of one span, times in seconds since 1970."""

    service: str
    name: str
    trace: bytes
    id: bytes
    parent: bytes
    kind: str
    begin: float
    end: float
    failed: bool
    attributes: dict[str, Any]


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Collects spans while it is entered."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __enter__(self) -> Receiver:
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            service = _values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_span(service, message) for message in scope.spans]
        return pb.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        """All of a name, by when they began."""
        return sorted((s for s in self.spans if s.name == name), key=lambda span: span.begin)


def _span(service: str, message: SpanMessage) -> Span:
    return Span(
        service=service,
        name=message.name,
        trace=message.trace_id,
        id=message.span_id,
        parent=message.parent_span_id,
        kind=SpanMessage.SpanKind.Name(message.kind).removeprefix("SPAN_KIND_").lower(),
        begin=message.start_time_unix_nano / 1e9,
        end=message.end_time_unix_nano / 1e9,
        failed=message.status.code == message.status.STATUS_CODE_ERROR,
        attributes=_values(message.attributes),
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {
        item.key: getattr(item.value, str(item.value.WhichOneof("value"))) for item in attributes
    }
