"""The speed of a server next to busy programs on the same two CPUs.

Two servers of SmolLM2 take turns, each a process of its own: one with the defaults of `griffin
serve`, and one with those of OpenMP (fixed `--threads`, libgomp's default spinning). This process
is the client. All processes are bound to the first two CPUs. Ratios are taken within rounds:
tokens/s on the busy machine to those on the idle machine, and the cost of short spinning on an idle
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import uvloop

from benchmarks.load import prompt
from benchmarks.processes import serving
from benchmarks.report import finish
from griffin_client import AsyncGriffinClient, Tokens
from griffin_core.engine.openmp import SETTINGS

CPUS = 2
PROMPT = 64
LIBGOMPS_SPIN = "300000"
"""The default of libgomp."""
SPINNING = "while True: pass"
MULTIPLYING = """
import torch
torch.set_num_threads(2)
a = torch.randn(512, 512)
while True:
    a @ a
"""
NEIGHBOURS = {"idle": (), "2 busy loops": (SPINNING,) * 2, "3 x 2 threads": (MULTIPLYING,) * 3}
MOST_S = 20.0
"""The seconds after which a stream is ended: next to heavy load some take a second per token."""
SETTLE_S = 3.0
"""The seconds that the busy programs need to start, since they import torch."""


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """One run of several streams.

    Args:
        ms: between two tokens, the median over streams of (last - first) / (tokens - 1).
        gap_p50_ms, gap_p99_ms: between two messages of a stream, over all streams.
    """

    ms: float
    gap_p50_ms: float
    gap_p99_ms: float


@contextlib.contextmanager
def neighbours(programs: tuple[str, ...]) -> Iterator[None]:
    """Runs some programs while the block runs."""
    running = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    try:
        if running:
            time.sleep(SETTLE_S)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Sets OpenMP's variables for the processes that the block starts."""
    before = {name: os.environ.pop(name, None) for name in SETTINGS}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in SETTINGS:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


async def streamed(target: str, streams: int, tokens: int) -> Streamed:
    """Runs several greedy, dense streams at once."""

    async def stream(client: AsyncGriffinClient, number: int) -> list[tuple[float, int]]:
        events = client.generate(
            token_ids=prompt(number, PROMPT),
            density=1.0,
            max_tokens=tokens,
            ignore_eos=True,
        )
        made, until = [], time.perf_counter() + MOST_S
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, Tokens):
                    made.append((time.perf_counter(), len(event.ids)))
                if time.perf_counter() > until:
                    break
        return made

    async with AsyncGriffinClient(target) as client:
        messages = await asyncio.gather(*(stream(client, number) for number in range(streams)))
    ms, gaps = [], []
    for own in messages:
        moments = [at for at, _ in own] or [time.perf_counter() - MOST_S]
        if len(moments) == 1:  # no message within the time limit
            moments.append(moments[0] + MOST_S)
        ms.append(1e3 * (moments[-1] - moments[0]) / max(1, sum(count for _, count in own[1:])))
        gaps += [1e3 * (after - before) for before, after in pairwise(moments)]
    return Streamed(
        ms=statistics.median(ms),
        gap_p50_ms=statistics.median(gaps),
        gap_p99_ms=statistics.quantiles([*gaps, gaps[-1]], n=100, method="inclusive")[98],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A server beside busy programs.")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--neighbours", nargs="+", choices=list(NEIGHBOURS), default=list(NEIGHBOURS)
    )
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    kinds = ["idle", *(kind for kind in options.neighbours if kind != "idle")]
    runs: dict[tuple[str, str, int], list[Streamed]] = {}
    with ExitStack() as servers:
        logs = Path(servers.enter_context(tempfile.TemporaryDirectory()))
        with environment():
            targets = {"griffin": servers.enter_context(serving(log=logs / "griffin"))}
        with environment(GOMP_SPINCOUNT=LIBGOMPS_SPIN):
            plain = serving("--threads", str(CPUS), log=logs / "plain")
            targets["plain OpenMP"] = servers.enter_context(plain)
        for target in targets.values():
            for streams in options.streams:
                uvloop.run(streamed(target, streams, 32))  # warms up
        for _ in range(options.rounds):
            for kind in kinds:
                with neighbours(NEIGHBOURS[kind]):
                    for streams in options.streams:
                        for name, target in targets.items():
                            run = uvloop.run(streamed(target, streams, options.tokens))
                            runs.setdefault((name, kind, streams), []).append(run)
                            print(f"{name}, {kind}, {streams} streams: {run.ms:.1f} ms", flush=True)
    results = []
    for (name, kind, streams), own in runs.items():
        idle = runs[name, "idle", streams]
        plain = runs["plain OpenMP", kind, streams]
        row = {
            "server": name,
            "neighbours": kind,
            "streams": streams,
            "ms": round(statistics.median(run.ms for run in own), 2),
            "tokens_per_s": round(statistics.median(1e3 * streams / run.ms for run in own), 1),
            "gap_p50_ms": round(statistics.median(run.gap_p50_ms for run in own), 2),
            "gap_p99_ms": round(statistics.median(run.gap_p99_ms for run in own), 2),
            "p99_over_p50": round(statistics.median(r.gap_p99_ms / r.gap_p50_ms for r in own), 2),
            "of_idle": round(
                statistics.median(a.ms / b.ms for a, b in zip(idle, own, strict=True)), 3
            ),
            "ms_over_plain": round(
                statistics.median(a.ms / b.ms for a, b in zip(own, plain, strict=True)), 3
            ),
        }
        results.append(row)
        print(
            f"{name:>12}  {kind:>13}  {streams:2d} streams  {row['ms']:8.2f} ms between tokens, "
            f"{row['tokens_per_s']:7.1f} tokens/s = {row['of_idle']:.2f} of idle; gaps p50 "
            f"{row['gap_p50_ms']:.1f}, p99 {row['gap_p99_ms']:.1f} ms = {row['p99_over_p50']:.1f} "
            f"times; {row['ms_over_plain']:.2f} of plain OpenMP's ms"
        )
    finish("neighbours", {"cpus": CPUS, "prompt_tokens": PROMPT, "rows": results})


if __name__ == "__main__":
    main()
