"""The `griffin` command: each subcommand is a module here and is imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

COMMANDS = (
    "serve",
    "generate",
    "chat",
    "info",
    "inspect",
    "check",
    "calibrate",
    "eval",
    "bench",
    "top",
    "key",
)
"""The subcommands, in the order of the help. Each is the ``app`` of the module of its name."""


class LazyGroup(TyperGroup):
    """Imports the module of a subcommand when the subcommand is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        return typer.main.get_command(import_module(f"{__name__}.{cmd_name}").app)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Griffin: LLM generation with prompt-adaptive structured pruning.",
)


@app.callback()
def griffin() -> None:
    """Makes ``app`` a group."""
