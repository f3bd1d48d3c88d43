"""How long the engine's turns take, so that one that never ends is noticed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

TIMES_LONGEST = 10
"""A turn is stuck if it takes this many times as long as the longest one before it."""


class TurnClock:
    """Times the turns of the engine's loop. The engine's thread writes it, and any may read it."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._longest_s = 0.0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A context in which a turn runs."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._longest_s = max(self._longest_s, self.age_s)
            self._began = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context, within a turn, in which it waits for something to do. What comes after it
        counts as a new turn."""
        self._began = None
        try:
            yield
        finally:
            self._began = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds that the turn has taken which runs now; 0 if none does."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def stuck(self, after_s: float) -> bool:
        """Whether the turn that runs now has taken longer than ``after_s``, and than any before it
        by a wide margin."""
        return self.age_s > max(after_s, TIMES_LONGEST * self._longest_s)
