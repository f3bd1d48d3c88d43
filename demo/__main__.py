"""Runs two servers, and completes one prompt at three densities; prints a table of the results.

Starts `griffin serve` twice, as a prefill and as a decode process, streams an answer at each
density through the client SDK, and stops both.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from griffin_client import (
    Finished,
    GriffinClient,
    GriffinClientError,
    PruningFigures,
    Started,
    Tokens,
)

DENSITIES = (1.0, 0.75, 0.5)
STOPPING = {"max_tokens": 48, "stop": ["\n\n"]}
PROMPT = Path(__file__).parent / "almanac.txt"
WHY = (
    "The prompt shows sixteen records of the kind that is asked for, so the experts chosen from it "
    "fit what follows: there pruning works even on a model this small."
)

console = Console(highlight=False)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One answer."""

    text: str
    finished: Finished
    agreeing: float
    """The share of the dense answer's tokens that this density would have chosen at the same
    position."""

    @property
    def pruning(self) -> PruningFigures:
        return self.finished.pruning


@contextlib.contextmanager
def server(*arguments: str, module: str = "griffin_server") -> Iterator[str]:
    """Runs `griffin serve` until the block ends.

    Args:
        module: the module to run as `griffin`.

    Yields:
        The server's address, once it serves.
    """
    command = [sys.executable, "-m", module, "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        [*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        yield _address(process)
    finally:
        process.terminate()
        process.communicate()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event.get("logger") == "griffin.load":
                console.print(f"  {event['event']}", style="dim")
            if event.get("event") == "serving":
                return str(event["address"])
    sys.exit("".join(said))


def answer(client: GriffinClient, prompt: str, density: float, dense: Run | None) -> Run:
    """Streams an answer to the terminal."""
    console.rule(f"density {density:.2f}", align="left")
    text = ""
    for event in client.generate(prompt, density=density, sharing="private", **STOPPING):
        match event:
            case Started():
                console.print(
                    f"{event.prompt_tokens} tokens prefilled in {event.prefill_s:.1f} s, "
                    f"{event.pruning.experts_per_layer} of {event.pruning.ff_width} neurons kept "
                    "in each layer",
                    style="dim",
                )
            case Tokens():
                text += event.text
                print(event.text, end="", flush=True)
            case Finished():
                print("\n")
                reference = text if dense is None else dense.text
                tokens = client.score(prompt, reference, density=density).tokens
                share = sum(token.greedy for token in tokens) / len(tokens)
                return Run(text=text, finished=event, agreeing=share)
    raise AssertionError("a stream without error ends in Finished")


def table(runs: list[Run]) -> Table:
    """Returns a table of the figures of all runs."""
    made = Table("density", *(f"{run.pruning.density:.2f}" for run in runs), title="What it did")
    rows = {
        "FF sparsity of its steps": [f"{1 - run.pruning.mean_density:.0%}" for run in runs],
        "time to first token, s": [f"{run.finished.timings.first_token_s:.2f}" for run in runs],
        "tokens/s": [f"{run.finished.tokens_per_second:.1f}" for run in runs],
        "slim view, MB": [f"{run.pruning.slim_view_bytes / 1e6:.0f}" for run in runs],
        "tokens": [str(run.finished.usage.generated_tokens) for run in runs],
        "of the dense run's tokens": ["all", *(f"{run.agreeing:.0%} agree" for run in runs[1:])],
    }
    for name, values in rows.items():
        made.add_row(name, *values)
    return made


def main() -> None:
    """Runs the demo."""
    began = time.monotonic()
    prompt = PROMPT.read_text(encoding="utf-8")
    console.print("Starting a prefill and a decode server on SmolLM2-135M-Instruct")
    with (
        server("--role", "prefill") as prefill,
        server("--role", "decode", "--prefill-target", prefill) as decode,
        GriffinClient(decode) as client,
    ):
        console.print(f"  prefill on {prefill}, decode on {decode}\n", style="dim")
        last = prompt.splitlines()[-1]
        console.print(f'An almanac of sixteen countries, and then "{last}".')
        console.print(f"{WHY}\n", style="dim")
        try:
            runs: list[Run] = []
            for density in DENSITIES:
                runs.append(answer(client, prompt, density, runs[0] if runs else None))
        except GriffinClientError as error:
            sys.exit(f"demo: {error}")
    console.print(table(runs))
    console.print(f"\n{time.monotonic() - began:.0f} s in all, the servers' start included.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
