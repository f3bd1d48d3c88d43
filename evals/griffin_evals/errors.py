"""What an evaluation can raise.

::

    EvalError
    ├── InvalidSetting      an argument of the model: what was given, and what is allowed
    ├── RequestRefused      a request of a task that cannot be answered, by its task and document
    ├── ServerGone          a server that did not come back in time
    ├── OtherModel          a server that came back with another model
    └── JournalError        a journal that cannot be opened or read, or that is in use
"""

from __future__ import annotations


class EvalError(Exception):
    """Base of all errors above."""


class InvalidSetting(EvalError, ValueError):
    """An argument is out of range, or does not go with another one.

    Args:
        name: of the argument.
        given: what it was.
        allowed: what it may be.
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
    """A file cannot be opened, is no journal, or is in use."""
