"""`griffin info`: a server's model and sessions."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from griffin_client import GriffinClient, SamplingDefaults
from griffin_server.commands.calls import call_errors
from griffin_server.commands.options import AsJson, Target

app = typer.Typer()


@app.command()
def info(target: Target = "localhost:50051", as_json: AsJson = False) -> None:
    """Show the server's model and its sessions."""
    with GriffinClient(target) as client, call_errors():
        model = client.model_info(timeout=10)
        sessions = client.list_sessions(timeout=10)
    if as_json:
        print(json.dumps({"model": asdict(model), "sessions": [asdict(s) for s in sessions]}))
        return
    console = Console(highlight=False)
    table = Table(show_header=False, box=None)
    for name, value in asdict(model).items():
        shown = _sampling_text(model.default_sampling) if name == "default_sampling" else str(value)
        table.add_row(name.replace("_", " "), shown)
    console.print(table)
    listing = Table("session", "state", "tokens", "density", "age s", box=None)
    for session in sessions:
        figures = session.pruning
        listing.add_row(
            session.session_id,
            session.state,
            str(session.context_tokens),
            f"{figures.density:g}",
            f"{session.age_s:.1f}",
        )
    if sessions:
        console.print(listing)


def _sampling_text(sampling: SamplingDefaults) -> str:
    """The fields that are set; "greedy" if none is."""
    given = {name: value for name, value in asdict(sampling).items() if value is not None}
    return ", ".join(f"{name} {value:g}" for name, value in given.items()) or "greedy"
