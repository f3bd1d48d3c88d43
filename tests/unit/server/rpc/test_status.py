"""Every error of the core has a status, and its details survive the way to the client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from griffin_client import errors as client_errors
from griffin_client.status_details import parse_details
from griffin_core import errors
from griffin_core.errors import (
    CapacityExhausted,
    EngineFault,
    GriffinError,
    HandoffBroken,
    InvalidRequest,
    NotReady,
    SessionNotFound,
)
from griffin_core.model.load import Model
from griffin_server.prefill_pool.call_errors import details_of
from griffin_server.rpc.generation import GenerationServicer
from griffin_server.rpc.status import (
    CODES,
    DETAILS_KEY,
    MAX_MESSAGE_BYTES,
    code_of,
    printable,
    status_of,
)
from tests.servers import Running, running


def subclasses(kind: type) -> set[type]:
    return {kind} | {sub for direct in kind.__subclasses__() for sub in subclasses(direct)}


REQUEST_ERRORS = [
    kind
    for kind in sorted(subclasses(GriffinError), key=lambda kind: kind.__name__)
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


@pytest.mark.parametrize(
    "code", dict.fromkeys(code for code, _ in CODES.values()), ids=lambda code: code.name
)
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


def test_who_asks_too_early_is_told_when_to_come_back() -> None:
    code, status = status_of(NotReady("loading", retry_after_s=2.0))
    assert code is grpc.StatusCode.UNAVAILABLE
    details = parse_details([(DETAILS_KEY, status.SerializeToString())])
    assert (details.reason, details.retry_after_s) == ("NOT_READY", 2.0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("as it is: Zürich 🌍", "as it is: Zürich 🌍"),
        ("two\nlines\ttab\x00\x1b[0m", r"two\nlines\ttab\x00\x1b[0m"),
        ("half a \ud83d pair", r"half a \ud83d pair"),
        ("turned\u202eround", r"turned\u202eround"),
        ("x" * MAX_MESSAGE_BYTES, "x" * MAX_MESSAGE_BYTES),
        ("x" * (MAX_MESSAGE_BYTES + 1), "x" * (MAX_MESSAGE_BYTES - 3) + "..."),
        ("🌍" * 1000, "🌍" * 249 + "..."),
        ("\x00" * 1000, (r"\x00" * 250)[:997] + "..."),
    ],
)
def test_any_text_is_escaped_and_cut(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert len(printable(text).encode()) <= MAX_MESSAGE_BYTES


def test_details_of_a_peer_that_cannot_be_read_are_none() -> None:
    assert details_of([(DETAILS_KEY, b"\x0b")]) is None
    assert details_of([(DETAILS_KEY, "text")]) is None


FOREIGN = {
    "long": "Unexpected role: " + "x" * 5000,
    "emoji": "🌍" * 5000,
    "percent signs": "%" * 9000,
    "control characters": "\x00\n" * 5000,
    "half pairs": "\ud800" * 9000,
}


@pytest.fixture(scope="module")
def server(tiny: Callable[[str], Model]) -> Iterator[Running]:
    with running(tiny("llama")) as serving:
        yield serving


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda text: InvalidRequest("messages", text, text), "INVALID_ARGUMENT"),
        (lambda text: InvalidRequest(f"messages[{text}]", text, text), "INVALID_ARGUMENT"),
        (lambda text: SessionNotFound(text, text), "NOT_FOUND"),
        (lambda text: CapacityExhausted(text, retry_after_s=1.0), "RESOURCE_EXHAUSTED"),
        (lambda text: HandoffBroken(f"prefill server a:1: {text}"), "UNAVAILABLE"),
        (lambda text: EngineFault(f"TemplateError: {text}"), "INTERNAL"),
        (ValueError, "INTERNAL"),
    ],
)
def test_a_status_fits_whatever_others_say(
    server: Running,
    make: Callable[[str], Exception],
    code: str,
    foreign: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that gets more than 8 KiB of metadata says RESOURCE_EXHAUSTED of its own."""

    async def fail(servicer: Any, request: Any, context: Any) -> Any:
        raise make(foreign)

    monkeypatch.setattr(GenerationServicer, "GetModelInfo", fail)
    with server.client() as client, pytest.raises(client_errors.GriffinClientError) as caught:
        client.model_info()
    assert caught.value.code.name == code
    assert "metadata" not in caught.value.message
    assert 80 < len(caught.value.message.encode()) <= MAX_MESSAGE_BYTES
    expected = code_of(error)[1] if isinstance(error := make("a"), GriffinError) else "ENGINE_FAULT"
    assert caught.value.reason == expected
