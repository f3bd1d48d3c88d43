"""The cost of metrics: 16 streams of SmolLM2 from a server, from one that is scraped every second,
and from one that counts nothing.

The servers are processes of their own; this process is the client. Their difference is smaller than
that of two runs of one server, so the counting of a step is also measured alone.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import uvloop

from benchmarks.ceiling import step_ceilings_ms
from benchmarks.load import step_s
from benchmarks.report import Rounds, about, finish, read_bandwidth
from benchmarks.streaming import DENSITY, PROMPT, SESSIONS, client_moments
from demo.__main__ import server
from griffin_core.engine.events import TokensMade
from griffin_core.model.hub import DEFAULT_MODEL
from griffin_core.model.load import load_model
from griffin_server.telemetry.metrics import Metrics, Request

METRICS_PORT = 19464
TOKENS_A_MESSAGE = 4
"""The number of tokens that a server with this many streams puts into one message."""
ROUNDS, STEPS = 7, 2000


@contextmanager
def scraped(port: int) -> Iterator[None]:
    """Scrapes a server every second until the block ends."""
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(1):
            with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as page:
                page.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def counting_s() -> float:
    """Returns the seconds that counting one step of all streams takes, measured alone."""
    metrics = Metrics()
    tokens = TokensMade(ids=(0,) * TOKENS_A_MESSAGE, text="", logprobs=())
    call = metrics.grpc_call("server_streaming", "/griffin.v1.GenerationService/Generate")
    streams = [Request(metrics, time.monotonic()) for _ in range(SESSIONS)]
    clock = time.perf_counter()
    for step in range(STEPS):
        metrics.stepped(0.03, SESSIONS)
        if step % TOKENS_A_MESSAGE == 0:
            for stream in streams:
                stream.made(tokens)
                call.sent()
    return (time.perf_counter() - clock) / STEPS


def main() -> None:
    model = load_model(DEFAULT_MODEL, progress=print)
    ceiling_ms = step_ceilings_ms(model.decoder, (DENSITY,), PROMPT, read_bandwidth())
    print(f"\n{SESSIONS} streams, {model.decoder.dtype}")
    print(f"ceiling by bytes, were there one stream: {ceiling_ms} ms a step")

    def step(target: str) -> float:
        return step_s(uvloop.run(client_moments(target)))

    def step_while_scraped(target: str) -> float:
        with scraped(METRICS_PORT):
            return step(target)

    share = ("--prefill-share", "1.0")
    with ExitStack() as servers:
        nothing = servers.enter_context(server(*share, module="benchmarks.uncounted"))
        counts = servers.enter_context(server(*share))
        watched = servers.enter_context(server(*share, "--metrics-port", str(METRICS_PORT)))
        rounds = Rounds(
            {
                "counts nothing": lambda: step(nothing),
                "counts": lambda: step(counts),
                "counts, scraped": lambda: step_while_scraped(watched),
            },
            rounds=ROUNDS,
        )
    ms = rounds.median_ms()
    for name, value in ms.items():
        print(f"{name:>16}  {value:7.2f} ms/step  {1e3 * SESSIONS / value:6.1f} tokens/s")
    cost = {name: round(1 - 1 / rounds.ratio(name, "counts nothing"), 4) for name in list(ms)[1:]}
    for name, part in cost.items():
        print(f"{name}: {part:.1%} of the throughput")
    alone_ms = counting_s() * 1e3
    alone = alone_ms / ms["counts"]
    print(f"the counting of a step, alone: {alone_ms:.3f} ms, {alone:.2%} of it\n")
    finish(
        "metrics",
        {
            **about(model),
            "sessions": SESSIONS,
            "ceiling_ms": ceiling_ms,
            "median_ms": ms,
            "cost": cost,
            "counting_ms": round(alone_ms, 4),
        },
    )


if __name__ == "__main__":
    main()
