"""Which calls are tried again, when, and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import grpc
import pytest

from griffin.v1 import generation_pb2 as pb
from griffin_client import (
    Aborted,
    AsyncGriffinClient,
    GriffinClient,
    GriffinClientError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServerFault,
    Started,
    Unavailable,
    retry,
)
from griffin_client.retry import Retries
from griffin_client.status_details import StatusDetails

RPC = "/griffin.v1.GenerationService/"


def failure(
    kind: type[GriffinClientError], retry_after_s: float | None = None
) -> GriffinClientError:
    return kind(grpc.StatusCode.UNKNOWN, "m", StatusDetails(retry_after_s=retry_after_s))


@pytest.mark.parametrize(
    ("kind", "hint_s", "tried_again"),
    [
        (Unavailable, None, True),
        (Unavailable, 1.0, True),
        (ResourceExhausted, 1.0, True),
        (ResourceExhausted, None, False),  # it will never fit
        (InvalidArgument, None, False),
        (Aborted, None, False),
        (ServerFault, None, False),
    ],
)
def test_only_what_is_safe_is_tried_again(
    kind: type[GriffinClientError], hint_s: float | None, tried_again: bool
) -> None:
    wait_s = Retries(2, None).wait_s(failure(kind, hint_s))
    assert (wait_s is not None) == tried_again


def test_a_hint_of_the_server_is_honoured_and_the_wait_is_no_shorter() -> None:
    for _ in range(100):
        wait_s = Retries(2, None).wait_s(failure(ResourceExhausted, 20.0))
        assert wait_s is not None and 20.0 <= wait_s <= 25.0


def test_without_a_hint_waits_double_up_to_a_limit() -> None:
    retries = Retries(10, None)
    waits = [retries.wait_s(failure(Unavailable)) for _ in range(10)]
    for wait_s, usual_s in zip(waits, [0.5, 1, 2, 4, 8, 8, 8, 8, 8, 8], strict=True):
        assert wait_s is not None and usual_s <= wait_s <= 1.25 * usual_s


def test_retries_are_counted() -> None:
    retries = Retries(2, None)
    assert [retries.wait_s(failure(Unavailable)) is None for _ in range(3)] == [False, False, True]
    assert Retries(0, None).wait_s(failure(Unavailable)) is None


def test_a_session_that_a_retry_does_not_find_was_lost_with_the_first_failure() -> None:
    retries, first, gone = Retries(2, None), failure(Unavailable), failure(NotFound)
    assert retries.reason(gone) is gone  # no call was tried again
    assert retries.wait_s(first) is not None
    assert retries.reason(gone) is first
    other = failure(InvalidArgument)
    assert retries.reason(other) is other


def test_no_wait_goes_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(retry.time, "monotonic", lambda: now)
    retries = Retries(5, 10.0)
    assert retries.wait_s(failure(ResourceExhausted, 20.0)) is None
    assert retries.wait_s(failure(ResourceExhausted, 1.0)) is not None
    now = 109.0
    assert retries.time_left_s() == pytest.approx(1.0)
    assert retries.wait_s(failure(ResourceExhausted, 1.0)) is None
    now = 111.0
    assert retries.time_left_s() == 0


class Failing(grpc.RpcError):
    """What a stub raises."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "not now"

    def initial_metadata(self) -> tuple[()]:
        return ()

    def trailing_metadata(self) -> tuple[()]:
        return ()


class Call:
    """A stream of a stub, sync and async at once: some events, then an error or the end."""

    def __init__(self, events: int, error: Exception | None) -> None:
        self.events, self.error, self.cancelled = events, error, False

    def __iter__(self) -> Iterator[pb.GenerateResponse]:
        for _ in range(self.events):
            yield pb.GenerateResponse(started=pb.Started(session_id="s"))
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> Any:
        for event in self:
            yield event

    def cancel(self) -> None:
        self.cancelled = True


class Stub:
    """Ends one call after another as the script says: (events, error)."""

    def __init__(self, *script: tuple[int, grpc.StatusCode | None]) -> None:
        self.script = list(script)
        self.calls: list[Call] = []
        self.timeouts: list[float | None] = []

    def Generate(self, request: Any, *, timeout: float | None, metadata: Any) -> Call:
        events, code = self.script[len(self.calls)]
        self.timeouts.append(timeout)
        self.calls.append(Call(events, code and Failing(code)))
        return self.calls[-1]


AWAY = grpc.StatusCode.UNAVAILABLE


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "JITTER", 0.0)


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)


async def events_of(kind: Any, stub: Stub, **options: Any) -> list[Any]:
    with patch("griffin.v1.generation_pb2_grpc.GenerationServiceStub", lambda channel: stub):
        client = kind("localhost:1")
    if kind is GriffinClient:
        return list(client.generate("a", **options))
    return [event async for event in client.generate("a", **options)]


BOTH = pytest.mark.parametrize("kind", [GriffinClient, AsyncGriffinClient])


@BOTH
@pytest.mark.usefixtures("no_waits")
async def test_a_stream_is_tried_again_before_its_first_event(kind: Any) -> None:
    stub = Stub((0, AWAY), (0, AWAY), (1, None))
    (event,) = await events_of(kind, stub)
    assert isinstance(event, Started)
    assert len(stub.calls) == 3 and all(call.cancelled for call in stub.calls)


@BOTH
@pytest.mark.usefixtures("no_waits")
async def test_a_stream_that_keeps_failing_ends_with_the_last_error(kind: Any) -> None:
    stub = Stub((0, AWAY), (0, AWAY), (0, AWAY), (1, None))
    with pytest.raises(Unavailable, match="not now"):
        await events_of(kind, stub)
    assert len(stub.calls) == 3


@BOTH
@pytest.mark.usefixtures("no_waits")
async def test_a_stream_is_not_tried_again_after_its_first_event(kind: Any) -> None:
    stub = Stub((1, AWAY), (1, None))
    with pytest.raises(Unavailable):
        await events_of(kind, stub)
    assert len(stub.calls) == 1


@BOTH
async def test_waits_count_in_the_timeout_of_the_call(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.05)
    stub = Stub((0, AWAY), (0, AWAY), (1, None))
    await events_of(kind, stub, timeout=10.0)
    first, second, third = stub.timeouts
    assert first is not None and second is not None and third is not None
    assert 9 < first <= 10 and second <= first - 0.05 and third <= second - 0.1
    assert Stub().timeouts == []


@BOTH
async def test_an_error_comes_at_once_if_the_wait_would_pass_the_deadline(kind: Any) -> None:
    stub, begin = Stub((0, AWAY), (1, None)), time.monotonic()
    with pytest.raises(Unavailable):
        await events_of(kind, stub, timeout=0.4)
    assert time.monotonic() - begin < 0.4
    assert len(stub.calls) == 1
