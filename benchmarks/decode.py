"""Decode of SmolLM2 after 384 prompt tokens: the engine at three densities, and transformers."""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.ceiling import step_bytes, step_ceilings_ms
from benchmarks.load import submit
from benchmarks.report import Rounds, about, apart, finish, read_bandwidth
from griffin_core.engine import Engine
from griffin_core.model.load import load_model
from griffin_core.model.source import DEFAULT_MODEL, resolve

PROMPT, TOKENS = 384, 64
DENSITIES = (1.0, 0.75, 0.5)


def engine_s(engine: Engine, ids: list[int], density: float) -> float:
    """Seconds a token, as the engine reports it."""
    inbox = submit(engine, ids, TOKENS, density=density, sharing="private")
    return inbox.finished().timings.decode_s / (TOKENS - 1)


@torch.inference_mode()
def transformers_s(reference: PreTrainedModel, ids: list[int]) -> float:
    """Seconds a token of eager ``generate``, its prefill taken off."""
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


def main() -> None:
    model = load_model(DEFAULT_MODEL, progress=print)
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
        },
    )


if __name__ == "__main__":
    main()
