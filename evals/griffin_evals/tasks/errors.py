"""Errors of tasks and their data; each message is one sentence for the user."""

from __future__ import annotations

from griffin_evals.errors import EvalError


class EvaluationError(EvalError):
    """An evaluation cannot go on: it says what was given and what is allowed."""


class BadDataFile(EvaluationError):
    """A data file is missing, ambiguous or has an invalid line: names file, line and column."""
