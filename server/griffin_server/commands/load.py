"""A load for a running server: what is sent, and the times and counts that come back."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from griffin_client import (
    AsyncGriffinClient,
    Finished,
    GriffinClientError,
    ModelInfo,
    Sharing,
    Started,
    Tokens,
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """The requests to send.

    Args:
        requests: the number of requests.
        concurrency: in a closed loop, the number of requests that run at once.
        rate: in an open loop, the requests per second on average. They are sent at random times
            (Poisson), however many are running. None selects the closed loop.
        prompts: texts to send in turn, as chats if the model has a chat template. None sends
            random tokens.
        prompt_tokens: (least, most) tokens of a random prompt, drawn uniformly.
        output_tokens: (least, most) tokens of a completion, drawn uniformly. End-of-sequence tokens
            are ignored, so that each completion has the number that was drawn.
        sampling: the client's sampling options; each request gets its own seed.
        densities: used in turn; None is the server's default.
        seed: the seed of lengths, prompts and arrival times.
        timeout_s: the deadline of each request, or None.
    """

    requests: int
    concurrency: int
    rate: float | None
    prompts: Sequence[str] | None
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    sampling: Mapping[str, Any]
    densities: Sequence[float | None]
    sharing: Sharing | None
    seed: int
    timeout_s: float | None


def read_prompts(path: Path) -> list[str]:
    """Texts from a file with one per line, or from a .jsonl file with one JSON object per line that
    has the text in "text" or "prompt". Empty lines are skipped.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
        ValueError: the file, or a line of JSON, has no text.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        texts = [_text_of(line, number) for number, line in numbered]
    else:
        texts = [line for _, line in numbered]
    if not texts:
        raise ValueError(f"{path} has no text; it needs one text per line")
    return texts


def _text_of(line: str, number: int) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from error
    if isinstance(value, dict):
        for name in ("text", "prompt"):
            if isinstance(value.get(name), str) and value[name].strip():
                return str(value[name])
    raise ValueError(f'line {number} has no text; it needs an object with "text" or "prompt"')


@dataclass
class Results:
    """What the requests gave. Times are in seconds on this process's monotonic clock.

    Args:
        sampling: the client's sampling options that were used.
    """

    sampling: Mapping[str, Any]
    first_token_s: list[float] = field(default_factory=list)
    stream_token_s: list[float] = field(default_factory=list)
    """For each stream, (time of last token - time of first token) / (tokens - 1)."""
    inter_token_s: list[float] = field(default_factory=list)
    """For each token, the time since the message before, divided by the tokens of its message."""
    message_gap_s: list[float] = field(default_factory=list)
    """The times between two messages of a stream."""
    end_to_end_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    """The number of errors by status code."""
    messages: dict[str, str] = field(default_factory=dict)
    """The first error message of each status code."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    wall_s: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The results as JSON values: seconds, counts, tokens per second."""
        return {
            "sampling": {name: self.sampling[name] for name in ("temperature", "top_p", "top_k")},
            "completed": len(self.end_to_end_s),
            "errors": dict(self.errors),
            "error_messages": self.messages,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "wall_s": self.wall_s,
            "tokens_per_s": self.generated_tokens / self.wall_s if self.wall_s else 0.0,
            "time_to_first_token_s": percentiles(self.first_token_s),
            "stream_token_s": percentiles(self.stream_token_s),
            "inter_token_latency_s": percentiles(self.inter_token_s),
            "message_gap_s": percentiles(self.message_gap_s),
            "end_to_end_s": percentiles(self.end_to_end_s),
        }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90 and p99; None without values."""
    if len(values) < 2:
        return dict.fromkeys(("p50", "p90", "p99"), values[0]) if values else None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


async def run_load(target: str, load: Load, console: Console) -> Results:
    """Sends a load and collects the results.

    Raises:
        GriffinClientError: the server does not answer GetModelInfo.
    """
    results = Results(sampling=load.sampling)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    async with AsyncGriffinClient(target, max_retries=0) as client:
        model = await client.model_info(timeout=10)
        clock = time.monotonic()
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("requests", total=load.requests, note="")

            async def one(number: int) -> None:
                await _one(client, load, number, model, results)
                rate = results.generated_tokens / (time.monotonic() - clock)
                errors = f" · {results.errors.total()} errors" if results.errors else ""
                progress.update(bar, advance=1, note=f"{rate:.1f} tokens/s{errors}")

            if load.rate is None:
                await _closed_loop(load, one)
            else:
                await _open_loop(load, load.rate, one)
        results.wall_s = time.monotonic() - clock
    return results


async def _closed_loop(load: Load, one: Any) -> None:
    numbers = iter(range(load.requests))

    async def worker() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(worker() for _ in range(load.concurrency)))


async def _open_loop(load: Load, rate: float, one: Any) -> None:
    draw = random.Random(load.seed)
    begin, due = time.monotonic(), 0.0
    async with asyncio.TaskGroup() as group:
        for number in range(load.requests):
            due += draw.expovariate(rate)
            await asyncio.sleep(max(0.0, begin + due - time.monotonic()))
            group.create_task(one(number))


async def _one(
    client: AsyncGriffinClient, load: Load, number: int, model: ModelInfo, results: Results
) -> None:
    draw = random.Random(f"{load.seed} {number}")
    prompt = _prompt(load, number, model, draw)
    max_tokens = draw.randint(*load.output_tokens)
    begin = last = time.monotonic()
    first, tokens = 0.0, 0
    try:
        async for event in client.generate(
            **prompt,
            density=load.densities[number % len(load.densities)],
            sharing=load.sharing,
            **load.sampling,
            seed=number,
            max_tokens=max_tokens,
            ignore_eos=True,
            timeout=load.timeout_s,
        ):
            now = time.monotonic()
            if isinstance(event, Tokens) and event.ids:
                results.generated_tokens += len(event.ids)
                tokens += len(event.ids)
                if first:
                    gap = now - last
                    results.message_gap_s.append(gap)
                    # The tokens of a message share the time since the one before.
                    results.inter_token_s.extend(gap / len(event.ids) for _ in event.ids)
                else:
                    first = now
                    results.first_token_s.append(now - begin)
                last = now
            elif isinstance(event, Started):
                results.prompt_tokens += event.prompt_tokens
            elif isinstance(event, Finished):
                results.end_to_end_s.append(now - begin)
                if tokens > 1:
                    results.stream_token_s.append((last - first) / (tokens - 1))
    except GriffinClientError as error:
        results.errors[error.code.name] += 1
        results.messages.setdefault(error.code.name, str(error))


def _prompt(load: Load, number: int, model: ModelInfo, draw: random.Random) -> dict[str, Any]:
    """A request's prompt, as an argument of ``generate``."""
    length = draw.randint(
        *load.prompt_tokens
    )  # always drawn, so that a seed gives the same outputs
    if load.prompts is None:
        return {"token_ids": [draw.randrange(model.vocabulary) for _ in range(length)]}
    text = load.prompts[number % len(load.prompts)]
    return {"messages": [("user", text)]} if model.has_chat_template else {"prompt": text}
