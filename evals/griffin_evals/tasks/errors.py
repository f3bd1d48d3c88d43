"""What tasks raise on purpose; each message is one sentence for the person at the terminal."""

from __future__ import annotations

from griffin_evals.errors import EvalError


class EvaluationError(EvalError):
    """An evaluation cannot go on: it says what was given and what is allowed."""


class BadDataFile(EvaluationError):
    """A data file is missing, ambiguous or has a wrong line: it names file, line and column."""
