"""The errors that an evaluation can raise.

::

    EvalError
    ├── InvalidSetting      an argument is invalid: what was given, and what is allowed
    ├── RequestRefused      a request of a task cannot be answered; names its task and document
    ├── ServerGone          a server did not come back in time
    ├── OtherModel          a server came back with another model
    └── JournalError        a journal cannot be opened or read, or is in use
"""

from __future__ import annotations


class EvalError(Exception):
    """Base of all errors above."""


class InvalidSetting(EvalError, ValueError):
    """An argument is out of range or conflicts with another one.

    Args:
        name: the name of the argument.
        given: its value.
        allowed: the allowed values.
    """

    def __init__(self, name: str, given: object, allowed: str) -> None:
        super().__init__(f"{name}: got {given}; allowed: {allowed}")


class RequestRefused(EvalError):
    """A request of a task cannot be answered."""


class ServerGone(EvalError):
    """A server could not be reached for longer than the caller wanted to wait."""


class OtherModel(EvalError):
    """A server holds another model than before."""


class JournalError(EvalError):
    """A file cannot be opened, is not a journal, or is in use."""
