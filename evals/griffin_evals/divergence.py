"""KL divergence from the dense model, by policy and density, on texts (``make eval``).

A text's first tokens are the prompt that chooses the experts; the tokens after it are
teacher-forced through the dense and the pruned model. Prints a table and one line of JSON.

    python -m griffin_evals.divergence [--text FILE ...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from griffin_core.experts.policies import POLICIES, PolicyName
from griffin_core.experts.selection import Selection
from griffin_core.forward.decode import StepTokens, decode_tokens
from griffin_core.forward.events import (
    LayerExperts,
)
from griffin_core.forward.prefill import prefill
from griffin_core.model.load import Model, load_model
from griffin_core.slim.packed import Packed
from griffin_core.spec.choices import CALIBRATED_POLICIES, DEFAULT_MODEL

ROOT = Path(__file__).parents[2]
UNCALIBRATED = [policy for policy in POLICIES if policy not in CALIBRATED_POLICIES]
PROMPT_TOKENS, CONTINUATION_TOKENS = 384, 128


@torch.inference_mode()
def logprobs(
    model: Model, token_ids: Sequence[int], prompt_tokens: int, selection: Selection
) -> Tensor:
    """Returns the log-probabilities after a prompt, on the experts that it chose: [T -
    prompt_tokens, V]."""
    decoder = model.decoder
    cache = decoder.new_cache(len(token_ids))
    events = prefill(decoder, token_ids[:prompt_tokens], selection, cache=cache)
    experts = [event.experts for event in events if isinstance(event, LayerExperts)]
    layers = zip(decoder.layers, experts, strict=True)
    view = [Packed().build(layer, kept, "gemm") for layer, kept in layers]
    rest = StepTokens(cache=cache, view=view, token_ids=token_ids[prompt_tokens:])
    return decode_tokens(decoder, [rest])[0].log_softmax(dim=1)


def divergence(
    model: Model, token_ids: Sequence[int], prompt_tokens: int, selection: Selection
) -> float:
    """Returns the mean KL(dense || pruned) over the tokens after the prompt, in nats."""
    dense = logprobs(model, token_ids, prompt_tokens, Selection(density=1.0))
    slim = logprobs(model, token_ids, prompt_tokens, selection)
    return float((dense.exp() * (dense - slim)).sum(dim=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    texts = [ROOT / "demo" / "article.txt", ROOT / "LICENSE"]
    parser.add_argument("--text", type=Path, nargs="+", default=texts, help="UTF-8 files")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--density", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--policy", nargs="+", default=list(UNCALIBRATED), choices=list(POLICIES))
    given = parser.parse_args()
    model = load_model(given.model, dtype=torch.float32, progress=print)
    needed = PROMPT_TOKENS + CONTINUATION_TOKENS
    samples = [model.tokenizer.encode(path.read_text(encoding="utf-8")) for path in given.text]
    if short := [p for p, ids in zip(given.text, samples, strict=True) if len(ids) < needed]:
        parser.error(f"--text: {short[0]} has fewer than {needed} tokens")

    results: dict[str, dict[str, float]] = {}
    print(f"\n{'KL, nats':>14}  " + "  ".join(f"{d:>6}" for d in given.density))
    for policy in given.policy:
        row = {}
        for density in given.density:
            name: PolicyName = policy
            selection = Selection(density=density, policy=name, seed=1)
            row[str(density)] = round(
                mean(divergence(model, ids[:needed], PROMPT_TOKENS, selection) for ids in samples),
                3,
            )
        results[policy] = row
        print(f"{policy:>14}  " + "  ".join(f"{kl:6.2f}" for kl in row.values()))
    print(json.dumps({"eval": "divergence", "model": model.name, "kl_nats": results}))


if __name__ == "__main__":
    main()
