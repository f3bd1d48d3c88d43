"""The effect of a long prompt on running streams: 8 streams of SmolLM2, and a new prompt of 1500
tokens.

Between two tokens of a stream there should be no more than one chunk of the prompt and two steps.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import torch

from benchmarks.ceiling import attention_weights
from benchmarks.load import prompt, submit
from benchmarks.report import about, apart, finish, matmul_rate
from griffin_core.engine.engine import Engine
from griffin_core.engine.limits import Limits
from griffin_core.model.hub import DEFAULT_MODEL
from griffin_core.model.load import load_model

STREAMS, PROMPT, LONG, TOKENS, ROUNDS = 8, 128, 1500, 256, 5
DENSITY = 0.75


def one_round(engine: Engine, chunk_tokens: int) -> tuple[float, list[float], list[float]]:
    """Returns the seconds of the prompt's slowest chunk alone, of steps before it arrived, and
    between tokens during its prefill."""
    whole_s = [
        submit(engine, prompt(99, tokens), 1, density=1.0, sharing="private")
        .finished()
        .timings.prefill_s
        for tokens in (*range(chunk_tokens, LONG, chunk_tokens), LONG)
    ]
    chunk_s = max(longer - shorter for shorter, longer in pairwise([0.0, *whole_s]))
    streams = [
        submit(engine, prompt(number, PROMPT), TOKENS, density=DENSITY, sharing="shared")
        for number in range(STREAMS)
    ]
    while min(len(stream.moments) for stream in streams) < 20:
        time.sleep(0.005)
    arrived = submit(engine, prompt(77, LONG), 1, density=DENSITY, sharing="private")
    arrived.finished()
    before: list[float] = []
    during: list[float] = []
    for stream in streams:
        stream.finished()
        during += [
            moment - last
            for last, moment in pairwise(stream.moments)
            if arrived.submitted < moment <= arrived.moments[0]
        ]
        # All tokens of a message have the same time, so the seconds of a step are a mean.
        earlier = [moment for moment in stream.moments if moment <= arrived.submitted][-20:]
        before.append((earlier[-1] - earlier[0]) / sum(moment > earlier[0] for moment in earlier))
    return chunk_s, before, during


def main() -> None:
    model = load_model(DEFAULT_MODEL, progress=print)
    spec, limits = model.decoder.spec, Limits()
    rate = apart(
        lambda: matmul_rate(
            model.decoder.dtype, limits.chunk_tokens, spec.hidden_size, spec.intermediate_size
        )
    )
    ff = 3 * spec.intermediate_size * spec.hidden_size
    weights = len(spec.layers) * (attention_weights(spec) + ff)
    ceiling_ms = 2 * weights * limits.chunk_tokens / rate * 1e3
    print(f"\n{STREAMS} streams, {model.decoder.dtype}, {torch.get_num_threads()} threads")
    print(f"ceiling of {limits.chunk_tokens} tokens by their products: {ceiling_ms:.0f} ms")
    engine = Engine(model, limits=limits)
    engine.start()
    try:
        one_round(engine, limits.chunk_tokens)  # warms up
        rounds = [one_round(engine, limits.chunk_tokens) for _ in range(ROUNDS)]
    finally:
        engine.stop()
    chunk_ms = statistics.median(chunk for chunk, _, _ in rounds) * 1e3
    step_ms = statistics.median(gap for _, before, _ in rounds for gap in before) * 1e3
    gaps = [gap * 1e3 for _, _, during in rounds for gap in during]
    p99_ms = statistics.quantiles(gaps, n=100, method="inclusive")[98]
    bound_ms = chunk_ms + 2 * step_ms
    print(f"a chunk {chunk_ms:.1f} ms, a step {step_ms:.1f} ms: together at most {bound_ms:.1f} ms")
    print(f"between tokens while the prompt was read: p99 {p99_ms:.1f} ms of {len(gaps)}\n")
    finish(
        "interleave",
        {
            **about(model),
            "ceiling_ms": round(ceiling_ms, 1),
            "chunk_ms": round(chunk_ms, 1),
            "step_ms": round(step_ms, 1),
            "bound_ms": round(bound_ms, 1),
            "p99_ms": round(p99_ms, 1),
        },
    )


if __name__ == "__main__":
    main()
