"""How a command fails when one of its calls to a server does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from griffin_client import GriffinClientError
from griffin_server.commands.failures import fail


@contextmanager
def call_errors() -> Iterator[None]:
    """A context in which a failed call ends the command with exit status 1."""
    try:
        yield
    except GriffinClientError as error:
        hint = "" if error.code.name != "UNIMPLEMENTED" else "; a server in role prefill?"
        fail(f"{error}{hint}")
