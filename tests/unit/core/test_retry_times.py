"""Requests that were refused together do not come back together."""

from __future__ import annotations

import pytest

from griffin_core.engine import retry_times
from griffin_core.engine.retry_times import LONGEST_S, RetryTimes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(retry_times.time, "monotonic", lambda: now[0])
    return now


def test_each_refused_request_gets_a_place_of_its_own(clock: list[float]) -> None:
    times = RetryTimes()
    assert [times.wait_s("a", 0.5) for _ in range(4)] == [0.5, 1.0, 1.5, 2.0]
    clock[0] += 1.5
    assert times.wait_s("a", 0.5) == 1.0
    clock[0] += 100
    assert times.wait_s("a", 0.5) == 0.5


def test_those_of_one_owner_do_not_keep_another_waiting(clock: list[float]) -> None:
    times = RetryTimes()
    for _ in range(1000):
        times.wait_s("a", 0.5)
    assert times.wait_s("b", 0.5) == 0.5


def test_no_wait_is_longer_than_the_longest(clock: list[float]) -> None:
    times = RetryTimes()
    assert max(times.wait_s("a", 1.0) for _ in range(1000)) == LONGEST_S
    clock[0] += LONGEST_S
    assert times.wait_s("a", 1.0) == 1.0


def test_owners_are_forgotten_once_their_times_have_passed(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_times, "MOST_OWNERS", 3)
    times = RetryTimes()
    for name in "abcd":
        times.wait_s(name, 1.0)
    assert times.wait_s("a", 1.0) == 2.0  # none has passed yet
    clock[0] += 10
    for name in "efgh":
        assert times.wait_s(name, 1.0) == 1.0
    assert len(vars(times)["_last"]) <= 5
