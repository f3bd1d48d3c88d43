"""The `griffin` command."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, NoReturn

import typer
import uvloop
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from griffin_client import (
    Analysis,
    Event,
    Finished,
    GriffinClient,
    GriffinClientError,
    SamplingDefaults,
    Started,
    Tokens,
)
from griffin_server.bench import Load, print_results, read_prompts, run_load
from griffin_server.top import GONE, gone, look_twice, watch

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Griffin: LLM generation with prompt-adaptive structured pruning.",
)
err = Console(stderr=True, highlight=False)

Target = Annotated[
    str, typer.Option(envvar="GRIFFIN_TARGET", help="host:port of a server in role all or decode.")
]
Density = Annotated[
    float | None,
    typer.Option(help="Fraction of FF neurons to run on, in (0, 1]; the server's if not given."),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help="topk, sampled, topk_sampled, magnitude or random; the server's if not given."
    ),
]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate; 256 if not given.")]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 is greedy; the server's if not given, which is greedy unless set there."),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Nucleus of the distribution, in (0, 1]; the server's if not given."),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Keep the k likeliest tokens, 0 for all; the server's if not given."),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Keep tokens at least so many times as likely as the likeliest, in [0, 1]; the "
        "server's if not given."
    ),
]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        help="Further variables of the chat template, a JSON object such as "
        "'{\"enable_thinking\": false}'."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Makes draws repeatable.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds for the whole call.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")]


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Serve a model. `griffin serve --help` lists all settings."""
    # Imported here because the other commands do without, and because their modules bring no torch:
    # the server answers before that is imported.
    from griffin_core.errors import GriffinError  # noqa: PLC0415
    from griffin_server.ops.environment import notes  # noqa: PLC0415
    from griffin_server.ops.logging import configure_logging  # noqa: PLC0415
    from griffin_server.ops.settings import Settings, describe, load_settings  # noqa: PLC0415
    from griffin_server.serve import serve as run  # noqa: PLC0415

    try:
        settings = load_settings(context.args)
    except ValidationError as error:
        _fail(describe(error), status=2)
    except (OSError, ValueError) as error:  # the TOML file
        _fail(f"config: {error}", status=2)
    configure_logging(settings.log_level, settings.log_format)
    for note in notes(os.environ, Settings.model_fields):
        logging.getLogger("griffin.settings").warning(note)
    try:
        with _ended_by_signals():
            uvloop.run(run(settings, logging.getLogger("griffin.load").info))
    except GriffinError as error:
        _fail(str(error))


@app.command()
def generate(
    prompt: Annotated[
        str, typer.Argument(help="The prompt; - reads standard input, @FILE reads a file.")
    ],
    target: Target = "localhost:50051",
    raw: Annotated[
        bool, typer.Option(help="Give the prompt as it is, without the chat template.")
    ] = False,
    density: Density = None,
    policy: Policy = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    chat_template_kwargs: TemplateKwargs = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Stream one completion, and a line of figures at its end."""
    text = _read(prompt)
    variables = _json_object("chat-template-kwargs", chat_template_kwargs)
    with GriffinClient(target) as client, _errors():
        as_chat = not raw and client.model_info(timeout=timeout).has_chat_template
        events = client.generate(
            None if as_chat else text,
            messages=[("user", text)] if as_chat else None,
            density=density,
            policy=policy,  # type: ignore[arg-type]  # the server names the allowed ones
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
        _show(events, as_json=as_json)


@app.command()
def info(target: Target = "localhost:50051", as_json: AsJson = False) -> None:
    """Show the server's model and its sessions."""
    with GriffinClient(target) as client, _errors():
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


@app.command()
def inspect(
    prompts: Annotated[
        list[str],
        typer.Argument(help="One or more; - reads standard input, @FILE reads a file."),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the pictures and their data.")],
    target: Target = "localhost:50051",
    model: Annotated[
        str | None,
        typer.Option(help="Load this model here instead of asking a server; as of `serve`."),
    ] = None,
    density: Annotated[
        float, typer.Option(help="Fraction of FF neurons that count as experts, in (0, 1].")
    ] = 0.5,
    policy: Policy = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Of which activations are drawn; first, middle and last if not given."),
    ] = None,
    timeout: Timeout = None,
) -> None:
    """Draw what prompts fire: activations, experts, norm mass, and how far experts agree."""
    try:
        from griffin_server.pictures import Inspected, draw  # noqa: PLC0415
    except ImportError as error:
        _fail(f"inspect needs matplotlib: install griffin-serving[inspect] ({error})")
    texts = [_read(prompt) for prompt in prompts]
    names = [shorten(text, 40, placeholder="…") for text in texts]
    with _errors(), _analyzer(model, target, timeout) as (layers, analyze):
        inspected = [
            Inspected(
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
        files = draw(inspected, out)
    except OSError as error:
        _fail(f"out: {error}")
    for file in files:
        print(file)


@contextmanager
def _analyzer(
    model: str | None, target: str, timeout_s: float | None
) -> Iterator[tuple[int, Callable[..., Analysis]]]:
    """How many layers a model has, and what analyzes prompts: a server, or the model itself."""
    if model is None:
        with GriffinClient(target) as client:
            layers = client.model_info(timeout=timeout_s).layers
            yield layers, partial(client.analyze_prompt, timeout=timeout_s)
        return
    # Imported here because they bring torch, which the other commands do without.
    from griffin_client.requests import analyze_request  # noqa: PLC0415
    from griffin_client.responses import analysis  # noqa: PLC0415
    from griffin_core.errors import GriffinError  # noqa: PLC0415
    from griffin_core.experts.selection import Selection  # noqa: PLC0415
    from griffin_core.model.load import load_model  # noqa: PLC0415
    from griffin_server.generation.analysis import analyze_here  # noqa: PLC0415

    def analyze(prompt: str, **options: Any) -> Analysis:
        request = analyze_request(prompt, options)
        return analysis(analyze_here(loaded, request, Selection(density=1.0)))

    try:
        with _ended_by_signals():
            loaded = load_model(model, progress=err.print)
        yield len(loaded.decoder.layers), analyze
    except GriffinError as error:
        _fail(str(error))


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="A directory, a .gguf file or a hub id, as of `serve`.")
    ],
    dtype: Annotated[
        str, typer.Option(help="In which both run: float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Say what of a model is understood, and compare its logits with those of transformers.

    The exit status is 0 if they are equal but for rounding, 1 if the model is refused, 3 if they
    differ, and 4 if transformers cannot load these files, so that nothing was compared.
    """
    # Imported here because it brings torch, which the other commands do without.
    from griffin_core.errors import GriffinError  # noqa: PLC0415
    from griffin_server.checked import check_and_print  # noqa: PLC0415

    try:
        with _ended_by_signals():
            status = check_and_print(model, dtype, device, as_json=as_json, progress=err.print)
    except GriffinError as error:
        _fail(str(error))
    raise typer.Exit(status)


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
        _fail(
            f"eval: no module {error.name}: it needs the extra `eval`, which is installed by "
            "pip install 'griffin-serving[eval]'"
        )
    raise typer.Exit(status)


@app.command()
def bench(
    target: Target = "localhost:50051",
    requests: Annotated[int, typer.Option(min=1, help="How many requests in all.")] = 64,
    concurrency: Annotated[
        int,
        typer.Option(min=1, help="Closed loop: this many requests at once, until all are done."),
    ] = 8,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Open loop instead: this many requests a second on average, at random moments "
            "(Poisson)."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Take prompts from this file, in turn: one text a line, or .jsonl with "
            '"text" or "prompt" in each line. Without it prompts are random tokens.'
        ),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="Length of a random prompt: a number, or least:most.")
    ] = "128",
    output_tokens: Annotated[
        str, typer.Option(help="Length of a completion: a number, or least:most.")
    ] = "64",
    temperature: Annotated[
        float, typer.Option(help="0 is greedy. Tokens are sampled unless you say so.")
    ] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus of the distribution, in (0, 1].")] = 0.9,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 is all.")] = 0,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Repeat it for several, taken in turn; the server's if not given."),
    ] = None,
    sharing: Annotated[
        str | None, typer.Option(help="private, shared or auto; the server's if not given.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed for prompt lengths, contents and arrival times.")
    ] = 0,
    timeout: Annotated[float | None, typer.Option(help="Seconds for each request.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put a running server under load and report latency percentiles.

    Tokens are sampled at temperature 0.7 with top-p 0.9, as users sample; --temperature 0 is
    greedy. Between tokens of a stream is (last - first) / (tokens - 1) of each.
    """
    if rate is not None and not 0 < rate < math.inf:
        _fail(f"rate: got {rate}; allowed: > 0", status=2)
    if not 0 <= temperature < math.inf:
        _fail(f"temperature: got {temperature}; allowed: >= 0", status=2)
    if not 0 < top_p <= 1:
        _fail(f"top-p: got {top_p}; allowed: (0, 1]", status=2)
    try:
        texts = None if prompts is None else read_prompts(prompts)
    except (OSError, ValueError) as error:
        _fail(f"prompts: {error}", status=2)
    load = Load(
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        prompts=texts,
        prompt_tokens=_range("prompt-tokens", prompt_tokens),
        output_tokens=_range("output-tokens", output_tokens),
        sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k},
        densities=density or [None],
        sharing=sharing,  # type: ignore[arg-type]  # the server names the allowed ones
        seed=seed,
        timeout_s=timeout,
    )
    with _errors():
        results = uvloop.run(run_load(target, load, err))
    if as_json:
        print(json.dumps(results.summary()))
    else:
        print_results(results, Console(highlight=False))
    if not results.end_to_end_s:
        _fail("no request finished")


@app.command()
def top(
    target: Target = "localhost:50051",
    interval_s: Annotated[
        float, typer.Option(help="Seconds between two looks, in (0, 3600].")
    ] = 1.0,
    once: Annotated[
        bool,
        typer.Option(
            "--once", help="Look twice, print one table and end; the default without a terminal."
        ),
    ] = False,
) -> None:
    """Watch a running server: its sessions, their tokens a second and their memory."""
    if not 0 < interval_s <= 3600:
        _fail(f"interval-s: got {interval_s:g}; allowed: (0, 3600]", status=2)
    on_terminal = sys.stdout.isatty()
    # rich takes 80 columns for what is no terminal, and cuts the rest.
    console = Console(highlight=False, width=None if on_terminal else 200)
    with _errors():
        if on_terminal and not (once or console.is_dumb_terminal):
            watch(target, interval_s, console)
            return
        try:
            console.print(look_twice(target, interval_s))
        except GONE as error:
            _fail(gone(target, error))


def _sampling_text(sampling: SamplingDefaults) -> str:
    """The fields that are set; "greedy" if none is."""
    given = {name: value for name, value in asdict(sampling).items() if value is not None}
    return ", ".join(f"{name} {value:g}" for name, value in given.items()) or "greedy"


def figures_line(started: Started, finished: Finished) -> str:
    """One line on how a completion went."""
    usage, pruning = finished.usage, finished.pruning
    return (
        f"{usage.prompt_tokens} + {usage.generated_tokens} tokens · "
        f"first token {finished.timings.first_token_s:.2f} s · "
        f"{finished.tokens_per_second:.1f} tokens/s · "
        f"FF density {pruning.density:g} ({pruning.experts_per_layer}/{pruning.ff_width}), "
        f"ran at {pruning.mean_density:.2f} · "
        f"{finished.reason}"
    )


def _show(events: Iterator[Event], *, as_json: bool) -> str:
    """Prints events as they come; returns the text."""
    text = ""
    started: Started | None = None
    for event in events:
        if as_json:
            print(json.dumps({"event": type(event).__name__.lower(), **asdict(event)}), flush=True)
        match event:
            case Started():
                started = event
            case Tokens():
                text += event.text
                if not as_json:
                    print(event.text, end="", flush=True)
            case Finished() if not as_json and started is not None:
                print(flush=True)
                err.print(f"[dim]{figures_line(started, event)}[/dim]", soft_wrap=True)
    return text


def _read(prompt: str) -> str:
    try:
        if prompt == "-":
            return sys.stdin.read()
        if prompt.startswith("@"):
            return Path(prompt[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _fail(f"prompt: {error}")
    return prompt


def _json_object(name: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        _fail(f"{name}: got {text!r}; allowed: a JSON object", status=2)
    return value


def _range(name: str, text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    try:
        values = int(least), int(most or least)
    except ValueError:
        values = 0, 0
    if not 1 <= values[0] <= values[1]:
        _fail(f"{name}: got {text!r}; allowed: a number >= 1, or least:most", status=2)
    return values


class _errors:  # reads as a statement
    """Turns a failed call into one line on stderr and exit status 1."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, GriffinClientError):
            hint = "" if error.code.name != "UNIMPLEMENTED" else "; a server in role prefill?"
            _fail(f"{error}{hint}")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Until a server takes signals itself. Ctrl-C would wait for the thread that loads a model, and
    SIGTERM has no effect of its own on process 1 of a container."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: os._exit(128 + got)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _fail(message: str, *, status: int = 1) -> NoReturn:
    err.print(f"griffin: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(status)


# Imported last, since it uses what is above.
from griffin_server.commands.chat import chat  # noqa: E402

app.command()(chat)
