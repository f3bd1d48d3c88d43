"""`griffin bench`: puts a running server under load and reports latencies and throughput."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from griffin_server.commands.arguments import number_range
from griffin_server.commands.calls import call_errors
from griffin_server.commands.failures import err, fail
from griffin_server.commands.load import Load, Results, read_prompts, run_load
from griffin_server.commands.options import AsJson, Target

app = typer.Typer()


@app.command()
def bench(
    target: Target = "localhost:50051",
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 64,
    concurrency: Annotated[
        int,
        typer.Option(
            min=1, help="Closed loop: keep this many requests running until all are done."
        ),
    ] = 8,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Open loop instead: send this many requests per second on average, at random "
            "times (Poisson)."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Take prompts from this file in turn: one text per line, or .jsonl with "
            '"text" or "prompt" in each line. By default prompts are random tokens.'
        ),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="Length of a random prompt: a number, or least:most.")
    ] = "128",
    output_tokens: Annotated[
        str, typer.Option(help="Length of a completion: a number, or least:most.")
    ] = "64",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the most likely tokens that together have this probability."
        ),
    ] = 0.9,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample from the k most likely tokens; 0 is all.")
    ] = 0,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Density; repeat it for several, used in turn; by default the server's."),
    ] = None,
    sharing: Annotated[
        str | None, typer.Option(help="private, shared or auto; by default the server's.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed for prompt lengths, contents and arrival times.")
    ] = 0,
    timeout: Annotated[
        float | None, typer.Option(help="Deadline of each request in seconds.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a running server under load and report latency percentiles.

    By default tokens are sampled at temperature 0.7 with top-p 0.9, as users do. "between tokens of
    a stream" is (last - first) / (tokens - 1), computed for each stream.
    """
    if rate is not None and not 0 < rate < math.inf:
        fail(f"rate: got {rate}; allowed: > 0", status=2)
    if not 0 <= temperature < math.inf:
        fail(f"temperature: got {temperature}; allowed: >= 0", status=2)
    if not 0 < top_p <= 1:
        fail(f"top-p: got {top_p}; allowed: (0, 1]", status=2)
    try:
        texts = None if prompts is None else read_prompts(prompts)
    except (OSError, ValueError) as error:
        fail(f"prompts: {error}", status=2)
    load = Load(
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        prompts=texts,
        prompt_tokens=number_range("prompt-tokens", prompt_tokens),
        output_tokens=number_range("output-tokens", output_tokens),
        sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k},
        densities=density or [None],
        sharing=sharing,  # type: ignore[arg-type]  # the server names the allowed ones
        seed=seed,
        timeout_s=timeout,
    )
    with call_errors():
        results = uvloop.run(run_load(target, load, err))
    if as_json:
        print(json.dumps(results.summary()))
    else:
        print_results(results, Console(highlight=False))
    if not results.end_to_end_s:
        fail("no request finished")


def print_results(results: Results, console: Console) -> None:
    """Prints a summary of the results."""
    summary = results.summary()
    console.print(
        f"{summary['completed']} completed in {results.wall_s:.1f} s · "
        f"{results.generated_tokens} tokens generated · {summary['tokens_per_s']:.1f} tokens/s"
    )
    table = Table("milliseconds", "p50", "p90", "p99", box=None)
    for name, key in (
        ("time to first token", "time_to_first_token_s"),
        ("between tokens of a stream", "stream_token_s"),
        ("between messages", "message_gap_s"),
        ("end to end", "end_to_end_s"),
    ):
        if values := summary[key]:
            table.add_row(name, *(f"{value * 1e3:.1f}" for value in values.values()))
    if table.row_count:
        console.print(table)
    for code, count in results.errors.items():
        console.print(f"{count} × {results.messages[code]}", markup=False)
