"""The cost of --batch-invariant: a model with and without it, by streams and density.

Two servers take turns, each a process of its own; the client, over gRPC, is this process. The
ceiling is the server without it. Sessions are private: without the option, single sessions run on
copies of their experts, or on a GPU on index sets; with it all sessions run zeroed, on all weights.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import uvloop

from benchmarks.load import prompt
from benchmarks.processes import serving
from benchmarks.report import finish
from griffin_client import AsyncGriffinClient, Tokens
from griffin_core.spec.choices import DEFAULT_MODEL

PROMPT = 64
CASES = ((1, 1.0), (4, 1.0), (16, 1.0), (1, 0.5), (4, 0.5))
"""Pairs of the number of streams and their density."""


async def step_ms(target: str, streams: int, density: float, tokens: int) -> float:
    """Returns the milliseconds between two tokens of a stream, the median over concurrent
    streams."""

    async def stream(client: AsyncGriffinClient, number: int) -> float:
        moments, made = [], []
        async for event in client.generate(
            token_ids=prompt(number, PROMPT),
            density=density,
            sharing="private",
            max_tokens=tokens,
            ignore_eos=True,
        ):
            if isinstance(event, Tokens):
                moments.append(time.perf_counter())
                made.append(len(event.ids))
        return 1e3 * (moments[-1] - moments[0]) / sum(made[1:])

    async with AsyncGriffinClient(target) as client:
        return statistics.median(
            await asyncio.gather(*(stream(client, number) for number in range(streams)))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="What --batch-invariant costs.")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", default="0", help="as of griffin serve")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    settings = (
        *("--model", options.model, "--device", options.device),
        *("--dtype", options.dtype, "--threads", options.threads),
        *("--memory-fraction", "0.4"),  # two on one device
    )
    found: dict[tuple[int, float], list[tuple[float, float]]] = {case: [] for case in CASES}
    with ExitStack() as servers:
        logs = Path(servers.enter_context(tempfile.TemporaryDirectory()))
        plain = servers.enter_context(serving(*settings, log=logs / "plain"))
        invariant = servers.enter_context(
            serving(*settings, "--batch-invariant", log=logs / "invariant")
        )
        for turn in range(options.rounds + 1):  # the first warms up
            for case in CASES:
                pair = [
                    uvloop.run(step_ms(target, *case, options.tokens))
                    for target in (plain, invariant)
                ]
                if turn:
                    found[case].append((pair[0], pair[1]))
    rows = []
    for (streams, density), pairs in found.items():
        row = {
            "streams": streams,
            "density": density,
            "ms": round(statistics.median(plain for plain, _ in pairs), 2),
            "invariant_ms": round(statistics.median(invariant for _, invariant in pairs), 2),
            "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        }
        rows.append(row)
        print(
            f"{streams:2d} streams, density {density}: {row['ms']:7.2f} ms a step, batch-invariant "
            f"{row['invariant_ms']:7.2f} ms = {row['ratio']} times"
        )
    finish(
        "invariant", {"dtype": options.dtype, "server_threads": int(options.threads), "rows": rows}
    )


if __name__ == "__main__":
    main()
