"""Means with their standard errors, and the rule that decides what may be claimed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ERRORS = 2.0
"""A difference is claimed only if it exceeds this many standard errors."""

RESAMPLES = 400
"""Resamples of a bootstrap, which give its standard error to within about 4 %."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over independent units, which are texts unless said otherwise.

    Args:
        mean: the mean, in the unit of the measured values.
        se: its standard error; None if it is not known, as with a single unit.
        n: number of units.
    """

    mean: float
    se: float | None
    n: int

    @property
    def differs(self) -> bool:
        """Whether the mean is more than ``ERRORS`` standard errors from zero."""
        return self.se is not None and abs(self.mean) > ERRORS * self.se

    def upper(self) -> float:
        """The mean plus ``ERRORS`` standard errors; infinite if the error is not known."""
        return float("inf") if self.se is None else self.mean + ERRORS * self.se

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object, with numbers rounded to five significant digits."""
        se = None if self.se is None else rounded(self.se)
        return {"mean": rounded(self.mean), "se": se, "n": self.n}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Estimate:
        """The inverse of ``to_json``."""
        return Estimate(mean=values["mean"], se=values["se"], n=values["n"])


def rounded(value: float) -> float:
    """Five significant digits, so that figures stay readable."""
    return float(f"{value:.5g}")


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per text.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("an estimate needs at least one value")
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    se = float(array.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return Estimate(mean=float(array.mean()), se=se, n=n)


def paired(one: Sequence[float], other: Sequence[float]) -> Estimate:
    """The mean of one - other, text by text.

    Raises:
        ValueError: their numbers differ, or there are none.
    """
    return estimate([a - b for a, b in zip(one, other, strict=True)])


def unpaired(one: Estimate, other: Estimate) -> Estimate:
    """one - other, for estimates from independent groups of texts."""
    known = one.se is not None and other.se is not None
    se = float(np.hypot(one.se or 0.0, other.se or 0.0)) if known else None
    return Estimate(mean=one.mean - other.mean, se=se, n=min(one.n, other.n))


def band(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Means and errors along a curve, as JSON: values [texts][points]."""
    points = [estimate(column) for column in zip(*values, strict=True)]
    return {
        "mean": [rounded(point.mean) for point in points],
        "se": [None if point.se is None else rounded(point.se) for point in points],
        "n": len(values),
    }


def bootstrap(
    groups: Sequence[int], statistic: Callable[[NDArray[np.int64]], Floats], seed: int = 0
) -> tuple[Floats, Floats | None]:
    """A statistic of texts, and its standard error by resampling whole texts within their groups.

    Args:
        groups: the group number of each text.
        statistic: indices of texts (some more than once) -> values of any fixed shape.

    Returns:
        The statistic of all texts, and its standard error; None if a group has a single text.
    """
    of_text = np.asarray(groups)
    members = [np.flatnonzero(of_text == group) for group in np.unique(of_text)]
    whole = statistic(np.arange(len(of_text)))
    if min(len(group) for group in members) < 2:
        return whole, None
    generator = np.random.default_rng(seed)
    draws = [
        statistic(np.concatenate([generator.choice(group, len(group)) for group in members]))
        for _ in range(RESAMPLES)
    ]
    return whole, np.nanstd(draws, axis=0, ddof=1)
