"""Prefill of SmolLM2: 384 tokens with the statistic, without it, and by transformers; and 16
prompts of 64 tokens, together in passes and one after the other."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from benchmarks.report import Rounds, about, finish, matmul_rate, timed
from griffin_core.experts.selection import Selection
from griffin_core.forward.prefill import CHUNK_TOKENS, launch, prefill
from griffin_core.forward.prompt import (
    Part,
    Prompt,
)
from griffin_core.model.decoder import Decoder
from griffin_core.model.hub import DEFAULT_MODEL, resolve
from griffin_core.model.load import load_model

TOKENS = 384
PROMPTS, SHORT = 16, 64
"""The number of short prompts that arrive together, and the tokens of each."""


def without_statistic(decoder: Decoder, ids: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    """Runs the same chunks, layers and cache with plain FF blocks; returns the final hidden state
    [1, D]."""
    cache = decoder.new_cache(len(ids))
    for chunk in torch.split(ids, chunk_tokens):
        hidden, attention = decoder.prepare_batch(chunk, [(cache, len(chunk))])
        for layer, block in enumerate(decoder.layers):
            hidden = decoder.layer(layer, hidden, attention, block.ff)
        cache.advance(len(chunk))
    return decoder.final_hidden(hidden[-1:])


@torch.inference_mode()
def read_prompts(decoder: Decoder, at_once: int) -> None:
    """Reads the short prompts in passes of ``at_once``, as a server's queue does."""
    for first in range(0, PROMPTS, at_once):
        prompts = [
            Prompt(decoder, range(1000 + n, 1000 + n + SHORT), Selection(density=0.5))
            for n in range(first, first + at_once)
        ]
        launch(decoder, [Part(prompt=prompt, tokens=SHORT) for prompt in prompts]).end()


@torch.inference_mode()
def main() -> None:
    model = load_model(DEFAULT_MODEL, progress=print)
    decoder, spec = model.decoder, model.decoder.spec
    where = resolve(DEFAULT_MODEL, decoder.dtype, print)
    reference = AutoModelForCausalLM.from_pretrained(where, dtype=decoder.dtype).eval()
    ids = torch.arange(1000, 1000 + TOKENS)
    token_ids = ids.tolist()

    rate = matmul_rate(decoder.dtype, TOKENS, spec.hidden_size, spec.intermediate_size)
    weights = sum(p.numel() for p in reference.model.layers.parameters())
    ceiling_ms = 2 * weights * TOKENS / rate * 1e3
    print(f"\nprefill of {TOKENS} tokens, {decoder.dtype}, {torch.get_num_threads()} threads")
    print(f"ceiling: {2 * weights * TOKENS / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s measured")

    rounds = Rounds(
        {
            "with statistic": timed(
                lambda: list(prefill(decoder, token_ids, Selection(density=0.5)))
            ),
            "without": timed(lambda: decoder.head(without_statistic(decoder, ids, TOKENS))),
            "transformers": timed(lambda: reference(ids[None], logits_to_keep=1, use_cache=True)),
        },
        rounds=15,
    )
    ms = rounds.median_ms()
    print(f"{'ceiling':>16}  {ceiling_ms:7.1f} ms")
    for name, value in ms.items():
        print(f"{name:>16}  {value:7.1f} ms")
    ratios = {
        "with/without": rounds.ratio("with statistic", "without"),
        "with/transformers": rounds.ratio("with statistic", "transformers"),
    }
    print(f"ratios: {ratios}\n")

    short = Rounds(
        {
            "together": timed(lambda: read_prompts(decoder, CHUNK_TOKENS // SHORT)),
            "one by one": timed(lambda: read_prompts(decoder, 1)),
        },
        rounds=15,
    )
    short_ms, short_ratio = short.median_ms(), short.ratio("together", "one by one")
    print(f"{PROMPTS} prompts of {SHORT} tokens: {short_ms}, {short_ratio} times\n")
    finish(
        "prefill",
        {
            **about(model),
            "tokens": TOKENS,
            "ceiling_ms": round(ceiling_ms, 1),
            "median_ms": ms,
            "ratios": ratios,
            "prompts_together": {
                "prompts": PROMPTS,
                "tokens_each": SHORT,
                "median_ms": short_ms,
                "ratio": short_ratio,
            },
        },
    )


if __name__ == "__main__":
    main()
