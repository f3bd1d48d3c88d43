"""`griffin inspect`: plots of what prompts activate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer

from griffin_client import Analysis, GriffinClient
from griffin_server.commands.arguments import read_prompt
from griffin_server.commands.calls import call_errors
from griffin_server.commands.failures import err, fail
from griffin_server.commands.options import Policy, Target, Timeout
from griffin_server.commands.signals import ended_by_signals

app = typer.Typer()


@app.command()
def inspect(
    prompts: Annotated[
        list[str],
        typer.Argument(help="One or more prompts; - reads standard input, @FILE reads a file."),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the plots and their data.")],
    target: Target = "localhost:50051",
    model: Annotated[
        str | None,
        typer.Option(
            help="Load this model in this process instead of calling a server; as in `serve`."
        ),
    ] = None,
    density: Annotated[
        float, typer.Option(help="Fraction of FF neurons that count as experts, in (0, 1].")
    ] = 0.5,
    policy: Policy = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="Layer whose activations are plotted; by default the first, middle and last."
        ),
    ] = None,
    timeout: Timeout = None,
) -> None:
    """Plot prompts' activations, experts and norm mass, and how much the experts overlap."""
    try:
        from griffin_server.commands.plots import PromptAnalysis, draw  # noqa: PLC0415
    except ImportError as error:
        fail(f"inspect needs matplotlib: install griffin-serving[inspect] ({error})")
    texts = [read_prompt(prompt) for prompt in prompts]
    names = [shorten(text, 40, placeholder="…") for text in texts]
    with call_errors(), _analyzer(model, target, timeout) as (layers, analyze):
        analyses = [
            PromptAnalysis(
                name=name,
                analysis=analyze(
                    text,
                    density=density,
                    policy=policy,
                    activation_layers=[] if index else layer or [0, layers // 2, layers - 1],
                ),
            )
            for index, (name, text) in enumerate(zip(names, texts, strict=True))
        ]
    try:
        files = draw(analyses, out)
    except OSError as error:
        fail(f"out: {error}")
    for file in files:
        print(file)


@contextmanager
def _analyzer(
    model: str | None, target: str, timeout_s: float | None
) -> Iterator[tuple[int, Callable[..., Analysis]]]:
    """A model's number of layers, and a function that analyzes a prompt: on a server, or on a model
    that is loaded in this process."""
    if model is None:
        with GriffinClient(target) as client:
            layers = client.model_info(timeout=timeout_s).layers
            yield layers, partial(client.analyze_prompt, timeout=timeout_s)
        return
    # Imported here because they import torch, which a call to a server does without.
    from griffin_client.requests import analyze_request  # noqa: PLC0415
    from griffin_client.responses import analysis  # noqa: PLC0415
    from griffin_core.errors import GriffinError  # noqa: PLC0415
    from griffin_core.experts.selection import Selection  # noqa: PLC0415
    from griffin_core.model.load import load_model  # noqa: PLC0415
    from griffin_server.rpc.analysis import analyze_in_process  # noqa: PLC0415

    def analyze(prompt: str, **options: Any) -> Analysis:
        request = analyze_request(prompt, options)
        return analysis(analyze_in_process(loaded, request, Selection(density=1.0)))

    try:
        with ended_by_signals():
            loaded = load_model(model, progress=err.print)
        yield len(loaded.decoder.layers), analyze
    except GriffinError as error:
        fail(str(error))
