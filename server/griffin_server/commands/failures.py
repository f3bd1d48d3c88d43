"""How a command fails: one line on stderr and an exit status."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

err = Console(stderr=True, highlight=False)


def fail(message: str, *, status: int = 1) -> NoReturn:
    """Ends the command with a message."""
    err.print(f"griffin: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(status)
