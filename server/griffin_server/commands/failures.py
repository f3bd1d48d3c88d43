"""How a command fails: one line on stderr and an exit status."""

from __future__ import annotations

from typing import Any, NoReturn

import typer
from rich.console import Console

from griffin_client import GriffinClientError

err = Console(stderr=True, highlight=False)


def fail(message: str, *, status: int = 1) -> NoReturn:
    """Ends the command with a message."""
    err.print(f"griffin: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(status)


class call_errors:  # reads as a statement
    """A context in which a failed call ends the command with exit status 1."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, GriffinClientError):
            hint = "" if error.code.name != "UNIMPLEMENTED" else "; a server in role prefill?"
            fail(f"{error}{hint}")
