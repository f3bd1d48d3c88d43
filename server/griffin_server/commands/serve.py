"""`griffin serve`: runs a server."""

from __future__ import annotations

import logging
import os

import typer
from pydantic import ValidationError

from griffin_core.errors import GriffinError
from griffin_server.commands.failures import fail
from griffin_server.commands.signals import ended_by_signals
from griffin_server.environment import notes
from griffin_server.settings import Settings, describe, load_settings

app = typer.Typer()


@app.command(
    add_help_option=False,  # pydantic-settings prints the help
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Serve a model. `griffin serve --help` lists all settings."""
    try:
        settings = load_settings(context.args)
    except ValidationError as error:
        fail(describe(error), status=2)
    except (OSError, ValueError) as error:  # from the TOML file
        fail(f"config: {error}", status=2)
    # Imported here because the help does without them.
    import uvloop  # noqa: PLC0415

    from griffin_server.lifecycle import serve as run  # noqa: PLC0415
    from griffin_server.telemetry.logging import configure_logging  # noqa: PLC0415

    configure_logging(settings.log_level, settings.log_format)
    for note in notes(os.environ, Settings.model_fields):
        logging.getLogger("griffin.settings").warning(note)
    if settings.own_prefill_tokens is not None:
        logging.getLogger("griffin.settings").warning(
            "own_prefill_tokens is now local_prefill_max_tokens; the old name works until the next "
            "release"
        )
    try:
        with ended_by_signals():
            uvloop.run(run(settings, logging.getLogger("griffin.load").info))
    except GriffinError as error:
        fail(str(error))
