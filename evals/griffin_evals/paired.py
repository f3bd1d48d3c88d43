"""Means with standard errors, and differences paired by document."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

ERRORS_NEEDED = 2.0
"""The number of standard errors that a difference must exceed to be claimed."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, and its standard error; None with fewer than two values."""

    mean: float
    stderr: float | None

    @property
    def claimed(self) -> bool:
        """Whether it differs from 0 by more than ``ERRORS_NEEDED`` standard errors. An error of 0
        claims nothing, since it comes from too few values."""
        return bool(self.stderr) and abs(self.mean) > ERRORS_NEEDED * (self.stderr or 0.0)


def mean_of(values: Sequence[float]) -> Estimate:
    """Returns the mean of independent values and its standard error: s / √n, where s divides by n -
    1."""
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(mean=statistics.fmean(values), stderr=stderr)


def paired(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Returns the mean of the differences values[i] - others[i].

    Raises:
        ValueError: the two have different lengths.
    """
    return mean_of([a - b for a, b in zip(values, others, strict=True)])


def mean_over_tasks(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several tasks' estimates, each task with the same weight. Documents of different
    tasks are independent, so squares of errors add up."""
    errors = [each.stderr for each in estimates]
    known = [error for error in errors if error is not None]
    whole = len(known) == len(errors)
    return Estimate(
        mean=statistics.fmean(each.mean for each in estimates),
        stderr=math.hypot(*known) / len(errors) if whole else None,
    )
