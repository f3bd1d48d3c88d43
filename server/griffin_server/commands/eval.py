"""`griffin eval`: what pruning costs on tasks."""

from __future__ import annotations

import typer

from griffin_server.commands.failures import fail

app = typer.Typer()


@app.command(
    name="eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def evaluate(context: typer.Context) -> None:
    """Measure what pruning costs on tasks. `griffin eval --help` lists all options."""
    # Imported here because the extra `eval` is not always installed.
    try:
        from griffin_evals.command import main  # noqa: PLC0415

        status = main(context.args)
    except ModuleNotFoundError as error:
        fail(
            f"eval: no module {error.name}: it needs the extra `eval`, which is installed by "
            "pip install 'griffin-serving[eval]'"
        )
    raise typer.Exit(status)
