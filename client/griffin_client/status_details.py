"""Reads the ``google.rpc`` details that a server sends with the status of a failed call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status


@dataclass(frozen=True, kw_only=True)
class StatusDetails:
    """What came with the status of a failed call.

    Args:
        violations: field -> what is wrong with it, from BadRequest.
        retry_after_s: seconds until another try is worth it, from RetryInfo; None without one.
        reason: machine-readable reason, from ErrorInfo; empty if the status does not come from a
            Griffin server.
        request_id: the id under which the server's logs have the call; empty if it sent none.
    """

    violations: Mapping[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    reason: str = ""
    request_id: str = ""


def parse_details(metadata: Iterable[Any]) -> StatusDetails:
    """Reads the metadata of a failed call, (key, value) pairs; what is missing stays empty."""
    found: dict[str, Any] = {}
    for key, value in metadata:
        if key == "x-request-id":
            found["request_id"] = value
        elif key == "grpc-status-details-bin":
            for detail in Status.FromString(value).details:
                found.update(_unpack(detail))
    return StatusDetails(**found)


def _unpack(detail: Any) -> dict[str, Any]:
    """The fields of ``StatusDetails`` that one ``google.protobuf.Any`` carries."""
    bad_request, retry, info = BadRequest(), RetryInfo(), ErrorInfo()
    if detail.Unpack(bad_request):
        return {"violations": {v.field: v.description for v in bad_request.field_violations}}
    if detail.Unpack(retry):
        return {"retry_after_s": retry.retry_delay.ToNanoseconds() / 1e9}
    if detail.Unpack(info):
        return {"reason": info.reason}
    return {}
