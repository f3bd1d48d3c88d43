"""Every error of the core has a status, and its details survive the way to the client."""

from __future__ import annotations

import grpc
import pytest

from griffin_client import errors as client_errors
from griffin_client.status_details import parse_details
from griffin_core import errors
from griffin_core.errors import CapacityExhausted, GriffinError, InvalidRequest, SessionNotFound
from griffin_server.ops.status import CODES, DETAILS_KEY, code_of, status_of


def subclasses(kind: type) -> set[type]:
    return {kind} | {sub for direct in kind.__subclasses__() for sub in subclasses(direct)}


REQUEST_ERRORS = [
    kind
    for kind in subclasses(GriffinError)
    if kind.__module__ == errors.__name__
    # These end a server's start, never a call.
    and not issubclass(kind, (errors.ModelError, errors.DeviceMemoryExhausted))
    and kind not in (GriffinError, errors.HandoffError)  # raised only as one of their kinds
]


@pytest.mark.parametrize("kind", REQUEST_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_of_a_request_is_in_the_table_itself(kind: type[GriffinError]) -> None:
    assert kind in CODES


def test_reasons_are_distinct() -> None:
    reasons = [reason for _, reason in CODES.values()]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("code", {code for code, _ in CODES.values()}, ids=lambda code: code.name)
def test_every_code_has_an_exception_in_the_client(code: grpc.StatusCode) -> None:
    kind = client_errors.EXCEPTIONS.get(code, client_errors.ServerFault)
    assert (kind is client_errors.ServerFault) == (code is grpc.StatusCode.INTERNAL)


def test_an_unlisted_error_takes_the_row_of_its_base() -> None:
    class Special(SessionNotFound):
        pass

    assert code_of(Special("x", "why")) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")


def test_an_invalid_field_is_named_in_the_details() -> None:
    _, status = status_of(InvalidRequest("sampling.top_p", 2.0, "(0, 1]"))
    details = parse_details([(DETAILS_KEY, status.SerializeToString())])
    assert details.violations == {"sampling.top_p": "got 2.0; allowed: (0, 1]"}
    assert details.reason == "INVALID_REQUEST"
    assert status.message == "sampling.top_p: got 2.0; allowed: (0, 1]"


def test_a_retry_hint_survives() -> None:
    _, status = status_of(CapacityExhausted("queue: full", retry_after_s=1.25))
    details = parse_details([(DETAILS_KEY, status.SerializeToString())])
    assert details.retry_after_s == 1.25


def test_no_retry_hint_for_what_will_never_fit() -> None:
    _, status = status_of(CapacityExhausted("too large", retry_after_s=None))
    assert parse_details([(DETAILS_KEY, status.SerializeToString())]).retry_after_s is None
