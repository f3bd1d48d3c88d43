"""`griffin chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from griffin_client import GriffinClient, Message, Sampling, Stopping
from griffin_server.commands.arguments import json_object
from griffin_server.commands.calls import call_errors
from griffin_server.commands.failures import err, fail
from griffin_server.commands.options import (
    AsJson,
    Density,
    MaxTokens,
    MinP,
    Policy,
    Seed,
    Target,
    Temperature,
    TemplateKwargs,
    TopK,
    TopP,
)
from griffin_server.commands.show import show

app = typer.Typer()


@app.command()
def chat(
    target: Target = "localhost:50051",
    system: Annotated[str | None, typer.Option(help="A system message to start with.")] = None,
    density: Density = None,
    policy: Policy = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    chat_template_kwargs: TemplateKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Talk with the model. An empty line or end of input ends it."""
    history = [Message(role="system", content=system)] if system else []
    variables = json_object("chat-template-kwargs", chat_template_kwargs)
    with GriffinClient(target) as client, call_errors():
        if not client.model_info().has_chat_template:
            fail("this server's model has no chat template; use `griffin generate --raw`")
        while text := _ask(as_json):
            history.append(Message(role="user", content=text))
            events = client.generate(
                messages=history,
                density=density,
                policy=policy,  # type: ignore[arg-type]  # the server names the allowed ones
                sampling=Sampling(
                    temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
                ),
                stopping=Stopping(max_tokens=max_tokens),
                chat_template_kwargs=variables,
            )
            reply = show(events, as_json=as_json)
            history.append(Message(role="assistant", content=reply))


def _ask(as_json: bool) -> str:
    if not as_json and sys.stdin.isatty():
        err.print("[bold]>[/bold] ", end="")
    return sys.stdin.readline().strip()
