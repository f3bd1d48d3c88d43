"""The client of ``benchmarks.served``: runs all streams of a row in its own process.

Reads one JSON object a line (``Row``'s fields), runs that many streams at once through the asyncio
SDK, and answers with one JSON object: ``figures``.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from griffin_client import AsyncGriffinClient, Tokens

FIRST_ID, IDS = 5, 30_000
"""Prompts are random ids in [FIRST_ID, IDS), which every model's vocabulary has."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The requests of a row.

    Args:
        streams: the number of requests, which start at the same time.
        prompt_tokens, output_tokens: the tokens of each request.
        density, sharing: for each request; None for the server's defaults.
        sampling: fields of ``Sampling``; each stream adds its own seed.
        round: each round has other prompts.
    """

    target: str
    streams: int
    prompt_tokens: int
    output_tokens: int
    density: float | None
    sharing: str | None
    sampling: dict[str, Any]
    round: int


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The times of a stream's messages.

    Args:
        messages: (seconds since the row began, tokens) of each message with tokens.
    """

    messages: Sequence[tuple[float, int]]

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.messages)

    @property
    def first_s(self) -> float:
        return self.messages[0][0]

    @property
    def last_s(self) -> float:
        return self.messages[-1][0]

    @property
    def token_s(self) -> float:
        """(last token - first token) / (tokens - 1)."""
        return (self.last_s - self.first_s) / (self.tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        return [later - before for (before, _), (later, _) in pairwise(self.messages)]


def figures(streams: Sequence[Stream]) -> dict[str, float]:
    """Returns milliseconds, and tokens per second from the row's start to its last token."""
    gaps = sorted(gap for stream in streams for gap in stream.gaps_s)
    last_s = max(stream.last_s for stream in streams)
    return {
        "ms": 1e3 * statistics.median(stream.token_s for stream in streams),
        "gap_p50_ms": 1e3 * statistics.median(gaps),
        "gap_p99_ms": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "first_token_ms": 1e3 * statistics.median(stream.first_s for stream in streams),
        "last_first_token_ms": 1e3 * max(stream.first_s for stream in streams),
        "tokens_per_s": sum(stream.tokens for stream in streams) / last_s,
    }


async def run(row: Row) -> list[Stream]:
    """Runs all streams of a row.

    Raises:
        GriffinClientError: a request failed.
    """
    prompts = []
    for number in range(row.streams):
        draw = random.Random(f"{row.round} {number}")
        prompts.append([draw.randrange(FIRST_ID, IDS) for _ in range(row.prompt_tokens)])
    begin = time.perf_counter()

    async def stream(client: AsyncGriffinClient, number: int) -> Stream:
        messages = []
        async for event in client.generate(
            token_ids=prompts[number],
            density=row.density,
            sharing=row.sharing,  # type: ignore[arg-type]
            **row.sampling,
            seed=1000 * row.round + number,
            max_tokens=row.output_tokens,
            ignore_eos=True,
        ):
            if isinstance(event, Tokens) and event.ids:
                messages.append((time.perf_counter() - begin, len(event.ids)))
        return Stream(messages=messages)

    async with AsyncGriffinClient(row.target) as client:
        await client.model_info(timeout=60)  # connects
        begin = time.perf_counter()
        return await asyncio.gather(*(stream(client, number) for number in range(row.streams)))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # standard output is only for answers
    for line in sys.stdin:
        found = figures(asyncio.run(run(Row(**json.loads(line)))))
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
