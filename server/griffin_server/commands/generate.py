"""`griffin generate`: streams one completion."""

from __future__ import annotations

from typing import Annotated

import typer

from griffin_client import GriffinClient
from griffin_server.commands.arguments import json_object, read_prompt
from griffin_server.commands.calls import call_errors
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
    Timeout,
    TopK,
    TopP,
    WarmupTokens,
)
from griffin_server.commands.show import show

app = typer.Typer()


@app.command()
def generate(
    prompt: Annotated[
        str, typer.Argument(help="The prompt; - reads standard input, @FILE reads a file.")
    ],
    target: Target = "localhost:50051",
    raw: Annotated[
        bool, typer.Option(help="Send the prompt as it is, without the chat template.")
    ] = False,
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
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop string; repeat it for several.")
    ] = None,
    chat_template_kwargs: TemplateKwargs = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Stream one completion, and end with a line of statistics."""
    text = read_prompt(prompt)
    variables = json_object("chat-template-kwargs", chat_template_kwargs)
    with GriffinClient(target) as client, call_errors():
        as_chat = not raw and client.model_info(timeout=timeout).has_chat_template
        events = client.generate(
            None if as_chat else text,
            messages=[("user", text)] if as_chat else None,
            density=density,
            policy=policy,  # type: ignore[arg-type]  # the server names the allowed ones
            correction=correction,  # type: ignore[arg-type]  # likewise
            correction_rank=correction_rank,
            warmup_tokens=warmup_tokens,
            checks=checks or None,
            agreement_floor=agreement_floor,
            speculation=speculation,  # type: ignore[arg-type]  # likewise
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            max_tokens=max_tokens,
            stop=stop,
            chat_template_kwargs=variables if as_chat else None,
            timeout=timeout,
        )
        show(events, as_json=as_json)
