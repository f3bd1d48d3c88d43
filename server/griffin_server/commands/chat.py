"""`griffin chat`: talk with a model in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from griffin_client import GriffinClient
from griffin_server.commands.arguments import json_object
from griffin_server.commands.calls import call_errors
from griffin_server.commands.conversation import Conversation
from griffin_server.commands.failures import err, fail
from griffin_server.commands.options import (
    AgreementFloor,
    AsJson,
    Checks,
    Correction,
    CorrectionRank,
    Density,
    MaxTokens,
    MinP,
    Policy,
    Seed,
    Speculation,
    Target,
    Temperature,
    TemplateKwargs,
    TopK,
    TopP,
    WarmupTokens,
)
from griffin_server.commands.show import show

HISTORY_LINES = 1000
"""Most lines that the history file keeps."""

PROMPT = "> "

app = typer.Typer()


@app.command()
def chat(
    target: Target = "localhost:50051",
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    density: Density = None,
    policy: Policy = None,
    correction: Correction = None,
    correction_rank: CorrectionRank = None,
    warmup_tokens: WarmupTokens = None,
    checks: Checks = False,
    agreement_floor: AgreementFloor = None,
    speculation: Speculation = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    chat_template_kwargs: TemplateKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Talk with the model.

    Ctrl-C during a reply ends the reply. Ctrl-C or Ctrl-D at the prompt, or an empty line, ends the
    program.
    """
    variables = json_object("chat-template-kwargs", chat_template_kwargs)
    options = {
        "density": density,
        "policy": policy,
        "correction": correction,
        "correction_rank": correction_rank,
        "warmup_tokens": warmup_tokens,
        "checks": checks or None,
        "agreement_floor": agreement_floor,
        "speculation": speculation,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
    }
    with GriffinClient(target) as client, call_errors():
        if not client.model_info().has_chat_template:
            fail("this server's model has no chat template; use `griffin generate --raw`")
        conversation = Conversation(client, system=system, variables=variables, options=options)
        on_terminal = not as_json and sys.stdin.isatty() and sys.stdout.isatty()
        with closing(conversation), _line_editing(on_terminal):
            while text := _ask(on_terminal):
                try:
                    with closing(conversation.reply(text)) as events:
                        show(events, as_json=as_json)
                except KeyboardInterrupt:
                    print(flush=True)
                    err.print("[dim]the reply was ended[/dim]")


def _ask(on_terminal: bool) -> str:
    """The user's next message; empty at the end of input, which Ctrl-C is too."""
    try:
        return input(PROMPT if on_terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        if on_terminal:
            print()
        return ""


@contextmanager
def _line_editing(on_terminal: bool) -> Iterator[None]:
    """Lets the user edit lines and go back to earlier ones, also to those of earlier chats."""
    try:
        import readline  # noqa: PLC0415  # Windows has none
    except ImportError:
        on_terminal = False
    if not on_terminal:
        yield
        return
    file = history_file()
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):  # a directory that cannot be written is no reason to fail
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch(mode=0o600)
            file.chmod(0o600)  # it holds what the user wrote
            readline.write_history_file(file)


def history_file() -> Path:
    """Where the lines of earlier chats are: in the state directory of the XDG specification."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # The specification has relative paths ignored.
    directory = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return directory / "griffin" / "chat_history"
