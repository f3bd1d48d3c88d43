"""Estimates in words: a difference is claimed only beyond two of its standard errors."""

from __future__ import annotations

import math

from griffin_evals.study.estimates import Estimate
from griffin_evals.study.store import Figures


def of(figures: Figures) -> Estimate:
    """The estimate that an entry of figures.json holds."""
    return Estimate.from_json(figures)


def shown(estimate: Estimate, digits: int = 2) -> str:
    """The mean and one standard error, "0.57 ± 0.01"; the mean alone if the error is not known.

    Args:
        digits: after the decimal point; up to two more where the error would be shown as zero.
    """
    if estimate.se:
        digits = min(max(digits, math.ceil(-math.log10(2 * estimate.se))), digits + 2)
    if estimate.se is None:
        return f"{estimate.mean:.{digits}f} (error not known)"
    return f"{estimate.mean:.{digits}f} ± {estimate.se:.{digits}f}"


def cell(figures: Figures | None, digits: int = 2) -> str:
    """An estimate as a table cell; a dash where there is none."""
    return "–" if figures is None else shown(of(figures), digits)


def claim(difference: Estimate, *, more: str, less: str, between: str) -> str:
    """Says in which direction something differs, or that no difference was seen.

    Args:
        difference: the estimate that the sentence reports.
        more, less: the sentence for a difference above and below zero, without its full stop.
        between: what was compared, for the sentence that claims nothing.

    Returns:
        A sentence with the difference, its error and n.
    """
    if difference.differs:
        sentence = more if difference.mean > 0 else less
    else:
        sentence = f"no difference was seen between {between}"
    return f"{sentence} ({_signed(difference)}, n = {difference.n})."


def _signed(estimate: Estimate) -> str:
    sign = "+" if estimate.mean > 0 else "−" if estimate.mean < 0 else ""
    size = Estimate(mean=abs(estimate.mean), se=estimate.se, n=estimate.n)
    return f"{sign}{shown(size, 3)}"
