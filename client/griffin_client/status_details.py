"""The google.rpc details that come with a status.

googleapis-common-protos has these messages, but the client needs grpcio and protobuf only, so the
few fields that are read are declared here, in a descriptor pool of their own that cannot clash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory

_Field = descriptor_pb2.FieldDescriptorProto
_STRING, _INT32, _MESSAGE = _Field.TYPE_STRING, _Field.TYPE_INT32, _Field.TYPE_MESSAGE

# message -> (field, number, type, message type, repeated); numbers from google/rpc/*.proto
_MESSAGES: dict[str, list[tuple[str, int, Any, str, bool]]] = {
    "Status": [
        ("code", 1, _INT32, "", False),
        ("message", 2, _STRING, "", False),
        ("details", 3, _MESSAGE, ".google.protobuf.Any", True),
    ],
    "FieldViolation": [
        ("field", 1, _STRING, "", False),
        ("description", 2, _STRING, "", False),
    ],
    "BadRequest": [("field_violations", 1, _MESSAGE, ".google.rpc.FieldViolation", True)],
    "RetryInfo": [("retry_delay", 1, _MESSAGE, ".google.protobuf.Duration", False)],
    "ErrorInfo": [("reason", 1, _STRING, "", False)],
}


def _message_classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    for module in (any_pb2, duration_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="griffin_client/status_details.proto",
        package="google.rpc",
        syntax="proto3",
        dependency=[any_pb2.DESCRIPTOR.name, duration_pb2.DESCRIPTOR.name],
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind, type_name, repeated in fields:
            label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            added = message.field.add(name=field_name, number=number, type=kind, label=label)
            if type_name:
                added.type_name = type_name
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"google.rpc.{name}"))
        for name in _MESSAGES
    }


_CLASSES = _message_classes()


@dataclass(frozen=True, kw_only=True)
class StatusDetails:
    """What came with a status.

    Args:
        violations: field -> description, of BadRequest.
        retry_after_s: of RetryInfo.
        reason: of ErrorInfo; empty if the status is not Griffin's own.
        request_id: of the call, to be found in the server's logs.
    """

    violations: Mapping[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    reason: str = ""
    request_id: str = ""


def parse_details(metadata: Iterable[Any]) -> StatusDetails:
    """Reads the metadata of a failed call; what is not there stays empty."""
    found: dict[str, Any] = {}
    for key, value in metadata:
        if key == "x-request-id":
            found["request_id"] = value
        elif key == "grpc-status-details-bin":
            for detail in _CLASSES["Status"].FromString(value).details:
                found.update(_parse(detail.type_url.rpartition(".")[2], detail.value))
    return StatusDetails(**found)


def _parse(kind: str, value: bytes) -> dict[str, Any]:
    if kind == "BadRequest":
        violations = _CLASSES[kind].FromString(value).field_violations
        return {"violations": {item.field: item.description for item in violations}}
    if kind == "RetryInfo":
        delay = _CLASSES[kind].FromString(value).retry_delay
        return {"retry_after_s": delay.seconds + delay.nanos / 1e9}
    if kind == "ErrorInfo":
        return {"reason": _CLASSES[kind].FromString(value).reason}
    return {}
