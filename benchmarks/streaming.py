"""The cost of gRPC: 16 streams of SmolLM2 from the engine alone, and through server and client.

The server is a process of its own, and this process is the client. Both share the machine's CPUs,
so the client's CPU time counts as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
import uvloop

from benchmarks.ceiling import step_ceilings_ms
from benchmarks.load import engine_moments, prompt, step_s
from benchmarks.report import Rounds, about, finish, read_bandwidth
from demo.__main__ import server
from griffin_client import AsyncGriffinClient, Tokens
from griffin_core.engine.engine import Engine
from griffin_core.engine.limits import Limits
from griffin_core.model.hub import DEFAULT_MODEL
from griffin_core.model.load import load_model

SESSIONS, PROMPT, TOKENS, DENSITY = 16, 128, 256, 0.5
INTERVALS = {"default": 0, "1 a message": 1}
"""The number of tokens per message."""


async def client_moments(target: str) -> list[list[float]]:
    """Returns the times of each stream's tokens."""

    async def stream(client: AsyncGriffinClient, number: int) -> list[float]:
        events = client.generate(
            token_ids=prompt(number, PROMPT),
            density=DENSITY,
            sharing="shared",
            max_tokens=TOKENS,
            ignore_eos=True,
        )
        return [
            time.perf_counter()
            async for event in events
            if isinstance(event, Tokens)
            for _ in event.ids
        ]

    async with AsyncGriffinClient(target) as client:
        return await asyncio.gather(*(stream(client, number) for number in range(SESSIONS)))


def main() -> None:
    model = load_model(DEFAULT_MODEL, progress=print)
    ceiling_ms = step_ceilings_ms(model.decoder, (DENSITY,), PROMPT, read_bandwidth())
    print(f"\n{SESSIONS} streams, {model.decoder.dtype}, {torch.get_num_threads()} threads")
    print(f"ceiling by bytes, were there one stream: {ceiling_ms} ms a step")
    engine = Engine(model, limits=Limits(prefill_share=1.0))  # so that all streams are soon live
    engine.start()
    try:
        with ExitStack() as servers:
            candidates: dict[str, Callable[[], float]] = {
                "engine": lambda: step_s(
                    engine_moments(
                        engine, SESSIONS, PROMPT, TOKENS, density=DENSITY, sharing="shared"
                    )
                )
            }
            for name, interval in INTERVALS.items():
                target = servers.enter_context(
                    server("--prefill-share", "1.0", "--stream-interval", str(interval))
                )
                candidates[name] = lambda target=target: step_s(uvloop.run(client_moments(target)))
            rounds = Rounds(candidates, rounds=7)
    finally:
        engine.stop()
    ms = rounds.median_ms()
    for name, value in ms.items():
        print(f"{name:>12}  {value:7.2f} ms/step  {1e3 * SESSIONS / value:6.1f} tokens/s")
    cost = {name: round(1 - 1 / rounds.ratio(name, "engine"), 4) for name in INTERVALS}
    for name, share in cost.items():
        print(f"gRPC and the client take {share:.1%} of the engine's throughput ({name})")
    print()
    finish(
        "streaming",
        {
            **about(model),
            "sessions": SESSIONS,
            "ceiling_ms": ceiling_ms,
            "median_ms": ms,
            "cost": cost,
        },
    )


if __name__ == "__main__":
    main()
