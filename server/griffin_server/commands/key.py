"""`griffin key`: makes a caller's key, and the line with its hash for the server."""

from __future__ import annotations

from typing import Annotated

import typer

from griffin_server.access_settings import CALLER, CALLER_ALLOWED
from griffin_server.commands.failures import fail
from griffin_server.security.api_keys import line_of, new_key

app = typer.Typer()


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="The name of the caller, who owns its sessions.")],
    group: Annotated[
        list[str] | None,
        typer.Option(
            help="A group of the caller, such as operator, whose members see everybody's sessions. "
            "Repeat it for several."
        ),
    ] = None,
) -> None:
    """Make a key for a caller.

    Standard output gets the line for the file of --api-keys, and standard error the key, which is
    not kept anywhere.
    """
    if not CALLER.fullmatch(name):
        fail(f"name: got {name!r}; allowed: {CALLER_ALLOWED}", status=2)
    made = new_key()
    typer.echo(line_of(made, name, tuple(group or ())))
    typer.echo(made, err=True)
