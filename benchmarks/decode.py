"""Decode of SmolLM2 after 384 prompt tokens: the engine at three densities, and transformers; then
several sessions at once, dense and at density 0.5 with each kind of sharing.

    python -m benchmarks.decode [--only sessions]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.ceiling import step_bytes, step_ceilings_ms
from benchmarks.load import engine_moments, step_s, submit
from benchmarks.report import Rounds, about, apart, finish, read_bandwidth
from griffin_core.engine.engine import Engine
from griffin_core.engine.limits import Limits
from griffin_core.model.hub import DEFAULT_MODEL, resolve
from griffin_core.model.load import Model, load_model
from griffin_core.spec.choices import Sharing

PROMPT, TOKENS = 384, 64
DENSITIES = (1.0, 0.75, 0.5)

SESSIONS = (1, 4, 16)
SESSIONS_PROMPT, SESSIONS_TOKENS, SESSIONS_ROUNDS = 128, 160, 5
SHARINGS: tuple[Sharing, ...] = ("private", "shared", "auto")


def engine_s(engine: Engine, ids: list[int], density: float) -> float:
    """Returns the seconds per token that the engine reports."""
    inbox = submit(engine, ids, TOKENS, density=density, sharing="private")
    return inbox.finished().timings.decode_s / (TOKENS - 1)


@torch.inference_mode()
def transformers_s(reference: PreTrainedModel, ids: list[int]) -> float:
    """Returns the seconds per token of eager ``generate``, without its prefill."""
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)

    def generate(tokens: int) -> float:
        clock = time.perf_counter()
        reference.generate(
            prompt,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
        return time.perf_counter() - clock

    return (generate(TOKENS) - generate(1)) / (TOKENS - 1)


def of_sessions(model: Model, rounds: int) -> dict[str, object]:
    """Returns the milliseconds of a step with several sessions, dense and at 0.5, and the ratios to
    dense."""
    # All prompts are submitted at once, so that all sessions are soon live; costs are measured.
    engine = Engine(model, limits=Limits(prefill_share=1.0), costs=None)
    engine.start()
    engine.ready.result()
    result: dict[str, object] = {}
    try:
        for sessions in SESSIONS:

            def step(density: float, sharing: Sharing, sessions: int = sessions) -> float:
                return step_s(
                    engine_moments(
                        engine,
                        sessions,
                        SESSIONS_PROMPT,
                        SESSIONS_TOKENS,
                        density=density,
                        sharing=sharing,
                    )
                )

            candidates: dict[str, Callable[[], float]] = {"dense": lambda: step(1.0, "private")}
            for sharing in SHARINGS:
                candidates[sharing] = lambda sharing=sharing: step(0.5, sharing)  # type: ignore[misc]
            timed = Rounds(candidates, rounds=rounds)
            ratios = {sharing: timed.ratio(sharing, "dense") for sharing in SHARINGS}
            best = min(1.0, ratios["private"], ratios["shared"])
            result[str(sessions)] = {
                "median_ms": timed.median_ms(),
                "of_dense": ratios,
                "auto_of_best": round(ratios["auto"] / best, 3),
            }
            print(f"{sessions:>3} sessions: {timed.median_ms()} ms/step; 0.5 of dense: {ratios}")
    finally:
        engine.stop()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["sessions"], help="no single session, no transformers")
    parser.add_argument("--rounds", type=int, default=SESSIONS_ROUNDS, help="of several sessions")
    given = parser.parse_args(arguments)
    model = load_model(DEFAULT_MODEL, progress=print)
    if given.only:
        finish("decode", {**about(model), "sessions": of_sessions(model, given.rounds)})
        return
    decoder = model.decoder
    where = resolve(DEFAULT_MODEL, decoder.dtype, print)
    reference = AutoModelForCausalLM.from_pretrained(where, dtype=decoder.dtype).eval()
    ids = list(range(1000, 1000 + PROMPT))

    bandwidth = read_bandwidth()
    cached = PROMPT + TOKENS // 2
    ceiling_ms = step_ceilings_ms(decoder, DENSITIES, cached, bandwidth)
    print(f"\n{TOKENS} tokens after {PROMPT}, {decoder.dtype}, {torch.get_num_threads()} threads")
    print(
        f"ceiling: {step_bytes(decoder, 1.0, cached) / 1e6:.0f} MB a token, dense, read at "
        f"{bandwidth / 1e9:.1f} GB/s measured: {ceiling_ms} ms"
    )
    engine = Engine(model)
    engine.start()
    try:
        rounds = Rounds(
            {
                **{f"density {d}": (lambda d=d: engine_s(engine, ids, d)) for d in DENSITIES},
                "transformers": lambda: apart(lambda: transformers_s(reference, ids)),
            },
            rounds=5,
        )
    finally:
        engine.stop()
    ms = rounds.median_ms()
    for name, value in ms.items():
        print(f"{name:>16}  {value:7.2f} ms/token  {1e3 / value:6.1f} tokens/s")
    ratios = {
        "transformers/dense": rounds.ratio("transformers", "density 1.0"),
        **{
            f"dense/density {d}": rounds.ratio("density 1.0", f"density {d}") for d in DENSITIES[1:]
        },
    }
    print(f"ratios: {ratios}\n")
    finish(
        "decode",
        {
            **about(model),
            "prompt_tokens": PROMPT,
            "ceiling_ms": ceiling_ms,
            "median_ms": ms,
            "ratios": ratios,
            "sessions": of_sessions(model, given.rounds),
        },
    )


if __name__ == "__main__":
    main()
