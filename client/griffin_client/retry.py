"""When a failed call is tried again.

A call is tried again only if the server has done nothing for it that the caller has seen: a stream
is not after its first event. It is tried again after ``Unavailable``, and after
``ResourceExhausted`` if the server says when there will be room (``RetryInfo``). The wait is what
the server says, else it doubles with each try; both are lengthened by a random share, so that
clients that were refused together do not come back together. No wait goes beyond the deadline.
"""

from __future__ import annotations

import random
import time
from typing import Any

from griffin_client.errors import (
    GriffinClientError,
    NotFound,
    ResourceExhausted,
    Unavailable,
    invalid_argument,
)

FIRST_WAIT_S, MAX_WAIT_S = 0.5, 8.0
"""Seconds before the first retry, and the longest wait, where the server does not say."""

JITTER = 0.25
"""A wait is lengthened by a random share of up to this."""


class Retries:
    """The deadline and the remaining retries of one call.

    Args:
        max_retries: how often the call is tried again at most, >= 0.
        timeout: seconds for the whole call, with its retries and their waits, > 0; None for no
            limit.

    Raises:
        InvalidArgument: one of them is not allowed.
    """

    def __init__(self, max_retries: int, timeout: float | None) -> None:
        self._left = check_max_retries(max_retries)
        check_timeout(timeout)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._backoff_s = FIRST_WAIT_S
        self._first: GriffinClientError | None = None

    def time_left_s(self) -> float | None:
        """Seconds until the deadline, at least 0; None if there is none."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - time.monotonic())

    def wait_s(self, error: GriffinClientError) -> float | None:
        """Seconds to wait before the next try; None if the error is final. It counts the try."""
        hint = getattr(error, "retry_after_s", None)
        retryable = isinstance(error, Unavailable) or (
            isinstance(error, ResourceExhausted) and hint is not None
        )
        if not retryable or self._left == 0:
            return None
        wait_s = (self._backoff_s if hint is None else hint) * (1 + JITTER * random.random())
        left_s = self.time_left_s()
        if left_s is not None and wait_s >= left_s:
            return None
        self._left -= 1
        self._first = self._first or error
        self._backoff_s = min(2 * self._backoff_s, MAX_WAIT_S)
        return wait_s

    def reason(self, error: GriffinClientError) -> GriffinClientError:
        """The error that the caller gets for a final one. A retry that does not find the session
        is the consequence of the first failure, with which the server has freed it."""
        return self._first if self._first and isinstance(error, NotFound) else error


def check_timeout(timeout: Any) -> float | None:
    """The timeout, if it is allowed.

    Raises:
        InvalidArgument: it is neither None nor a number > 0.
    """
    if timeout is None or (_is_number(timeout, int, float) and timeout > 0):
        return timeout  # type: ignore[no-any-return]  # just checked
    raise invalid_argument("timeout", timeout, "allowed: seconds > 0, or None for no limit")


def check_max_retries(max_retries: Any) -> int:
    """The number of retries, if it is allowed.

    Raises:
        InvalidArgument: it is not an integer >= 0.
    """
    if _is_number(max_retries, int) and max_retries >= 0:
        return max_retries  # type: ignore[no-any-return]  # just checked
    raise invalid_argument("max_retries", max_retries, "allowed: an integer >= 0")


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
