"""Multiple-choice items per second: ``LLM.score_choices`` in process, ``score_choices`` of a
running server, and lm-eval's own ``hf`` model on the same weights, all in float32 at density 1.

The three take turns, each in a process of its own. hf runs at its best batch size, and its OpenMP
threads wait as in Griffin, which is as fast on an idle machine and faster on a busy one. Their
log-probabilities are compared. Further lines show the engine at density 0.5.

    python -m benchmarks.scoring                         # items made up here
    python -m benchmarks.scoring --data FILE --items 200  # JSON lines with query, choices, gold

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceiling import attention_weights
from benchmarks.processes import Helper, serving
from benchmarks.report import Rounds, apart, finish, matmul_rate
from griffin_client import AsyncGriffinClient, Score
from griffin_core.model.decoder import Decoder
from griffin_core.model.hub import DEFAULT_MODEL, resolve
from griffin_core.model.load import load_model

STEP_ROWS = 256
"""The rows of the matrix product that the ceiling is measured with."""

Item = tuple[str, list[str]]


def made_up(count: int) -> list[Item]:
    """Returns questions of 5 to 25 words of two syllables, with two to four answers of 1 to 12
    words."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        syllables = [f"{draw.choice('bdfklmnrst')}{draw.choice('aeiou')}" for _ in range(2 * most)]
        pairs = zip(syllables[::2], syllables[1::2], strict=True)
        return " ".join("".join(pair) for pair in pairs)[: 5 * draw.randint(least, most) - 1]

    return [
        (
            f"Question: {words(5, 25)}?\nAnswer:",
            [f" {words(1, 12)}" for _ in range(draw.randint(2, 4))],
        )
        for _ in range(count)
    ]


def from_file(path: Path, count: int) -> list[Item]:
    """Reads items from JSON lines with query and choices."""
    items = []
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        given = json.loads(line)
        context = given["query"].rstrip()  # lm-eval scores spaces with what follows them
        spaces = given["query"][len(context) :]
        items.append((context, [f"{spaces} {choice}" for choice in given["choices"]]))
    return items


async def by_server(target: str, items: Sequence[Item], calls: int) -> list[tuple[Score, ...]]:
    """Scores all items on a server with ``calls`` calls at once."""
    turn = asyncio.Semaphore(calls)
    async with AsyncGriffinClient(target) as client:

        async def score(item: Item) -> tuple[Score, ...]:
            async with turn:
                return await client.score_choices(*item, density=1.0)

        return await asyncio.gather(*map(score, items))


def ceiling(answer: dict[str, Any], items: Sequence[Item], decoder: Decoder) -> dict[str, float]:
    """Returns the items per second by matrix products alone, with each context read once and last
    tokens not run."""
    spec = decoder.spec
    weights = sum(
        attention_weights(spec) + layer.ff.weights.w_in.numel() + layer.ff.weights.down.numel()
        for layer in decoder.layers
    )
    scored = sum(tokens for item in answer["scores"] for _, tokens in item)
    run = sum(answer["context_tokens"]) + scored - sum(len(item) for item in answer["scores"])
    flop = 2 * (weights * run + spec.hidden_size * spec.vocab_size * scored)
    rate = apart(
        lambda: matmul_rate(torch.float32, STEP_ROWS, spec.hidden_size, spec.intermediate_size)
    )
    return {"gflop": flop / 1e9, "gflop_s": rate / 1e9, "items_s": len(items) * rate / flop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, help="JSON lines with query, choices and gold")
    parser.add_argument("--items", type=int, default=60, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--calls", type=int, default=32, help="at once, of the server's client")
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=[1, 4, 8, 16, 32],
        help="of hf, of which the fastest is taken; default %(default)s",
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    items = from_file(given.data, given.items) if given.data else made_up(given.items)
    directory = str(resolve(DEFAULT_MODEL, torch.float32, print))
    question = {"items": items, "mode": "generation", "density": 1.0}
    arguments = ("--model", directory, "--dtype", "float32", "--threads", str(given.threads))
    answers: dict[str, Any] = {}

    def ask(name: str, helper: Helper, **changes: Any) -> float:
        answers[name] = helper.ask({**question, **changes})
        return float(answers[name]["seconds"])

    with (
        tempfile.TemporaryDirectory() as logs,
        serving(*arguments, log=Path(logs) / "server.log") as target,
        Helper("benchmarks.scoring_side", "griffin", directory, str(given.threads)) as griffin,
        Helper("benchmarks.scoring_side", "hf", directory, str(given.threads)) as hf,
    ):

        def serve() -> float:
            clock = time.perf_counter()
            scored = asyncio.run(by_server(target, items, given.calls))
            seconds = time.perf_counter() - clock
            answers["server"] = {"scores": [[[s.logprob, 0] for s in item] for item in scored]}
            return seconds

        ask("engine", griffin)
        decoder = load_model(directory, dtype=torch.float32).decoder
        most = ceiling(answers["engine"], items, decoder)
        del decoder
        print(
            f"\n{len(items)} items; ceiling {most['items_s']:.2f} items/s: {most['gflop']:.0f} "
            f"GFLOP at {most['gflop_s']:.0f} GFLOP/s measured"
        )
        some = items[: max(8, len(items) // 4)]
        sizes = given.batch_sizes
        tried = {size: ask("hf", hf, items=some, batch_size=size) for size in sizes}
        best = min(tried, key=tried.__getitem__)
        rounds = Rounds(
            {
                "hf": lambda: ask("hf", hf, batch_size=best),
                "engine": lambda: ask("engine", griffin),
                "server": serve,
                "generation, 0.5": lambda: ask("half", griffin, density=0.5),
                "classification, 0.5": lambda: ask(
                    "half", griffin, density=0.5, mode="classification"
                ),
            },
            rounds=given.rounds,
        )
    rates = {name: round(len(items) / ms * 1e3, 2) for name, ms in rounds.median_ms().items()}
    for name, rate in rates.items():
        print(f"{name:>20}  {rate:7.2f} items/s  {1 / rounds.ratio(name, 'hf'):5.2f} x hf")
    agreement = {name: agree(answers[name], answers["hf"]) for name in ("engine", "server")}
    print(f"beside hf (batch size {best}): {agreement}\n")
    finish(
        "scoring",
        {
            "model": DEFAULT_MODEL,
            "dtype": "float32",
            "data": given.data.name if given.data else "made up",
            "items": len(items),
            "ceiling_items_s": round(most["items_s"], 2),
            "items_s": rates,
            "hf_batch_size": best,
            "over_hf": {n: round(1 / rounds.ratio(n, "hf"), 3) for n in ("engine", "server")},
            "agreement": agreement,
        },
    )


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Returns the largest difference of two sides' log-probabilities, and the number of items on
    which their choices differ."""
    pairs = [
        ([one for one, _ in item], [other for other, _ in beside])
        for item, beside in zip(ours["scores"], theirs["scores"], strict=True)
    ]
    return {
        "largest_difference": max(abs(a - b) for o, t in pairs for a, b in zip(o, t, strict=True)),
        "other_choices": sum(o.index(max(o)) != t.index(max(t)) for o, t in pairs),
    }


if __name__ == "__main__":
    main()
