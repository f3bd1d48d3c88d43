"""Writes docs/reference/errors.md from the server's and the client's tables: `make reference`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
from page_parts import summary, table

from griffin_client.errors import EXCEPTIONS, ServerFault
from griffin_core.errors import GriffinError
from griffin_server.rpc.status import CODES

PAGE = Path(__file__).with_name("errors.md")


def page() -> str:
    """The whole page."""
    errors = list(_errors())
    calls = [error for error in errors if _row(error) != CODES[GriffinError]]
    starts = [error for error in errors if error not in calls and error is not GriffinError]
    exceptions = [(f"`{code.name}`", exception) for code, exception in EXCEPTIONS.items()]
    parts = [
        "# Errors",
        "This page is generated from the code (`make reference`), and a test keeps it fresh. A "
        "call that fails ends with a gRPC status. Its message says what was wrong, what was given "
        "and what is allowed. Its details are messages of `google.rpc`: `ErrorInfo` with the "
        "reason, `BadRequest` with the field of an invalid argument, and `RetryInfo` with the time "
        "after which another try is worth it.",
        "## Errors of calls",
        table(
            ("status", "reason", "Python client", "core", "meaning"),
            [_of_call(error) for error in (*calls, GriffinError)],
        ),
        "A status without a reason comes from gRPC itself, from a proxy, or from the client: "
        "`UNIMPLEMENTED` if the server has another role, `RESOURCE_EXHAUSTED` for a message above "
        "`--max-request-bytes`, `UNAVAILABLE` if nothing answers.",
        "## Exceptions of the Python client",
        table(
            ("exception", "status", "meaning"),
            [
                (f"`{exception.__name__}`", code, summary(exception))
                for code, exception in (*exceptions, ("any other", ServerFault))
            ],
        ),
        "All of them are kinds of `GriffinClientError`. The client itself tries `Unavailable` "
        "again, and `ResourceExhausted` if the server says when; see [errors and retries]"
        "(../guide/python.md#errors-and-retries).",
        "## Errors at the start",
        "These end `griffin serve` with exit status 1 and one line, and are raised by `LLM` and "
        "`load_model`. No call ends with them.",
        table(
            ("core", "meaning"),
            [(f"`{error.__name__}`", summary(error)) for error in starts],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _errors(error: type[GriffinError] = GriffinError) -> Iterator[type[GriffinError]]:
    """The errors of the core that are raised, in the order of its tree."""
    kinds = [kind for kind in error.__subclasses__() if kind.__module__ == error.__module__]
    for kind in kinds:
        yield from _errors(kind)
    if not kinds or error in CODES:
        yield error


def _row(error: type[GriffinError]) -> tuple[grpc.StatusCode, str]:
    """An error's row in the server's table, or that of its nearest base class."""
    return next(CODES[kind] for kind in error.__mro__ if kind in CODES)


def _of_call(error: type[GriffinError]) -> tuple[str, ...]:
    code, reason = _row(error)
    exception = EXCEPTIONS.get(code, ServerFault)
    meaning = "Any other error of the server." if error is GriffinError else summary(error)
    names = (code.name, reason, exception.__name__, error.__name__)
    return (*(f"`{name}`" for name in names), meaning)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name}\n")
