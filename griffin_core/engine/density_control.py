"""Density by measured agreement: a session that names a floor runs on as few neurons as keep its
agreement with the dense model above it, as far as its checks show."""

from __future__ import annotations

DENSITIES = (1.0, 0.75, 0.5)
"""The rungs, few, so that sessions can share sets."""

FIRST_DENSITY = 0.75
"""Where a session begins to prune."""

WARMUP_TOKENS = 48
"""The warm-up of a request that names a floor and no warm-up."""

MARGIN = 0.1
"""By how much agreement must exceed the floor for fewer neurons; half of the way from the floor to
1, if that is less."""

FIRST_STAY, LONGEST_STAY = 64, 1024
"""For how many tokens a session that has come to run dense stays dense: the first time, each time
twice as long, and at most."""


class DensityControl:
    """The density of one turn.

    Args:
        floor: the least agreement that is wanted, in (0, 1).
    """

    def __init__(self, floor: float) -> None:
        self.floor = floor
        self._rung = DENSITIES.index(FIRST_DENSITY)
        self._stay = FIRST_STAY
        self._dense_until = 0

    @property
    def density(self) -> float:
        """The density to run at."""
        return DENSITIES[self._rung]

    @property
    def ceiling(self) -> float:
        """The agreement above which fewer neurons are tried."""
        return min(self.floor + MARGIN, (1 + self.floor) / 2)

    def checked(self, agreement: float, length: int) -> None:
        """Takes the agreement that a check has measured.

        Args:
            length: tokens of the session.
        """
        if agreement < self.floor:
            self._rung = max(0, self._rung - 1)
            if self.density == 1:
                self._dense_until = length + self._stay
                self._stay = min(2 * self._stay, LONGEST_STAY)
        elif agreement > self.ceiling:
            self._rung = min(len(DENSITIES) - 1, self._rung + 1)

    def tries(self, length: int) -> bool:
        """Whether a session of so many tokens has been dense for long enough to prune again."""
        return self.density == 1 and length >= self._dense_until

    def prune(self) -> None:
        """Tries the rung below dense. The next check tells whether it holds."""
        self._rung = 1
