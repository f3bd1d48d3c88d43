"""What it costs to know who calls: TLS and identity, and a session set for each of many callers.

    python -m benchmarks.callers                         on a CPU, with the default model
    python -m benchmarks.callers --device cuda --shape llama-3-8b --model-dir /tmp/random

The ceiling is the same server without TLS, which does not ask who calls. Both are measured in turn,
and the medians of their ratios are reported: tokens a second of 16 streams, and the time to the
first token of one more stream on a kept connection. Then 16 callers with a stream each at density
0.5 with `auto` are compared with 16 dense streams of one caller. Prints one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.random_model import write_random_model
from griffin_client import GriffinClient, Tls, Tokens
from griffin_server.security.api_keys import line_of
from tests.certificates import Authority
from tests.servers import Process

STREAMS = 16


def stream(client: GriffinClient, tokens: int, prompt: int, density: float) -> tuple[float, float]:
    """Runs a stream to its end: seconds to the first token, and seconds between tokens."""
    began, first = time.perf_counter(), 0.0
    options: dict[str, Any] = {"density": density, "ignore_eos": True, "temperature": 0.8}
    for event in client.generate(
        token_ids=[5 + i % 1000 for i in range(prompt)], max_tokens=tokens, **options
    ):
        if isinstance(event, Tokens) and not first:
            first = time.perf_counter()
    return first - began, (time.perf_counter() - first) / (tokens - 1)


def together(
    clients: Sequence[GriffinClient], tokens: int, prompt: int, density: float
) -> dict[str, float]:
    """A stream on each client at once: tokens a second, and milliseconds between tokens."""
    gaps: list[float] = []

    def run(client: GriffinClient) -> None:
        gaps.append(stream(client, tokens, prompt, density)[1])

    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    clock = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - clock
    return {
        "tokens_s": tokens * len(clients) / seconds,
        "ms_between": 1000 * statistics.median(gaps),
    }


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", help="random weights instead of --model")
    parser.add_argument("--model-dir", type=Path, default=Path(tempfile.gettempdir()) / "random")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    model = str(write_random_model(given.shape, given.model_dir)) if given.shape else given.model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = Authority(folder)
        own = authority.issue("server", "127.0.0.1", "localhost")
        names = [f"caller-{number}" for number in range(STREAMS)]
        keys = {name: f"griffin-{name:.>43}" for name in names}
        (folder / "keys").write_text("\n".join(line_of(key, name) for name, key in keys.items()))
        common = ("--model", model, "--device", given.device, "--density", "0.5")
        secure = (
            *("--tls-cert", str(own.cert), "--tls-key", str(own.key)),
            *("--api-keys", str(folder / "keys"), "--max-caller-sessions", str(STREAMS)),
        )
        memory = ("--memory-fraction", "0.4") if given.device != "cpu" else ()
        with Process(*common, *memory) as plain, Process(*common, *memory, *secure) as guarded:
            unasked = plain.target(within_s=300)
            plain_clients = [GriffinClient(unasked, max_retries=0) for _ in names]
            target, tls = guarded.target(within_s=300), Tls(ca=authority.cert)
            callers = [GriffinClient(target, tls=tls, api_key=keys[name]) for name in names]
            alone = [GriffinClient(target, tls=tls, api_key=keys[names[0]]) for _ in names]
            print(json.dumps(measured(given, plain_clients, callers, alone)))


def measured(
    given: argparse.Namespace,
    plain: Sequence[GriffinClient],
    callers: Sequence[GriffinClient],
    alone: Sequence[GriffinClient],
) -> dict[str, Any]:
    """All ratios, as medians over rounds in turn."""
    rows: dict[str, list[float]] = {}
    for number in range(given.rounds + 1):
        ceiling = together(plain, given.tokens, given.prompt, 1.0)
        guarded = together(alone, given.tokens, given.prompt, 1.0)
        many = together(callers, given.tokens, given.prompt, 0.5)
        firsts = [
            statistics.median(stream(client, 2, 16, 1.0)[0] for _ in range(15))
            for client in (plain[0], alone[0])
        ]
        row = {
            "tokens_s_of_plain": guarded["tokens_s"] / ceiling["tokens_s"],
            "first_token_more_ms": 1000 * (firsts[1] - firsts[0]),
            "16_callers_ms_of_dense": many["ms_between"] / guarded["ms_between"],
            "dense_ms": guarded["ms_between"],
            "plain_tokens_s": ceiling["tokens_s"],
        }
        sys.stderr.write(f"{json.dumps({k: round(v, 3) for k, v in row.items()})}\n")
        if number:  # the first warms up
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
    return {
        "benchmark": "callers",
        "device": given.device,
        "model": given.shape or given.model,
        **{name: round(statistics.median(values), 3) for name, values in rows.items()},
    }


if __name__ == "__main__":
    main()
