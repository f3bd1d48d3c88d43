"""When requests that were refused may come back."""

from __future__ import annotations

import time

LONGEST_S = 60.0
"""The longest wait that a refused request is told."""

MOST_OWNERS = 1000
"""Owners above which those whose refused requests have all had their time are forgotten."""


class RetryTimes:
    """Gives each refused request of an owner a place of its own in time. If all were told when the
    next place is free, thousands would come back for it at once, again and again, and to refuse
    them would take the server's time."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        """Owner -> when its last refused request comes back, on ``time.monotonic``."""

    def wait_s(self, owner: str, place_s: float) -> float:
        """Seconds until the next refused request of an owner should come back.

        Args:
            place_s: seconds between two places that become free.
        """
        now = time.monotonic()
        if len(self._last) > MOST_OWNERS:
            self._last = {name: at for name, at in self._last.items() if at > now}
        at = min(max(now, self._last.get(owner, 0.0)) + place_s, now + LONGEST_S)
        self._last[owner] = at
        return at - now
