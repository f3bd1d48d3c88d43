"""How many requests fall below a floor of agreement with the dense model: with a density that
follows checks, and with fixed ones.

    python -m griffin_evals.floor_study [--model MODEL] [--data FOLDER] [--floor 0.6]

Texts of several domains are continued. Agreement is counted afterwards over all tokens of each
completion: the share that the dense model draws too, with the same seed after the tokens before it.
Greedy completions of small models repeat themselves and agree almost always. Prints a table and one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from griffin_core.backends.torch_sampling import TorchSlots
from griffin_core.engine.events import PruningFigures
from griffin_core.experts.selection import Selection
from griffin_core.forward.prefill import launch
from griffin_core.forward.prompt import Part, Prompt
from griffin_core.llm import LLM
from griffin_core.model.decoder import Decoder
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.choices import DEFAULT_MODEL
from griffin_evals.study.corpus import load_corpus

DENSE = Selection(density=1.0)


@torch.inference_mode()
def agreement(
    decoder: Decoder, prompt: Sequence[int], completion: Sequence[int], params: SamplingParams
) -> float:
    """The share of a completion's tokens that the dense model draws too, by the reference
    sampler."""
    ids = [*prompt, *completion]
    read = Prompt(decoder, ids[:-1], DENSE, wants_hidden=True)
    launch(decoder, [Part(prompt=read, tokens=len(ids) - 1)]).end()
    logits = decoder.head(read.hidden[0][len(prompt) - 1 :])
    slots = TorchSlots(1, decoder.device)
    if params.temperature:
        slots.open(0, params, ())
    places = torch.arange(len(prompt), len(ids))
    drawn = slots.sample(logits, torch.zeros_like(places), places).tolist()
    return float(mean(one == other for one, other in zip(drawn, completion, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--data", type=Path, help="folder of DOMAIN.jsonl or DOMAIN/*.txt")
    parser.add_argument("--only", nargs="+", help="domains; default all")
    parser.add_argument("--floor", type=float, default=0.6)
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.6, 0.75, 0.9])
    parser.add_argument("--per-domain", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--sessions", type=int, default=8)
    given = parser.parse_args()
    corpus = load_corpus(given.data)
    settings: dict[str, dict[str, Any]] = {f"{d:g}": {"density": d} for d in given.density}
    settings[f"floor {given.floor:g}"] = {"agreement_floor": given.floor}
    with LLM(given.model, max_sessions=given.sessions, progress=print) as llm:
        prompts = []
        for domain in given.only or list(corpus):
            own = _prompts(llm, corpus[domain].values(), given)
            print(f"{domain}: {len(own)} prompts", flush=True)
            prompts += own
        rows = []
        for name, options in settings.items():
            rows.append({"name": name, **_measure(llm, prompts, options, given)})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(json.dumps({"requests": len(prompts), "floor": given.floor, "settings": rows}))


def _prompts(llm: LLM, texts: Any, given: argparse.Namespace) -> list[list[int]]:
    """Prompts of one domain: the beginnings of its texts, then further pieces of them."""
    encoded = [llm.model.tokenizer.encode(text) for text in texts]
    pieces, size = [], given.prompt_tokens
    for begin in range(0, max(map(len, encoded)), size):
        pieces += [ids[begin : begin + size] for ids in encoded if len(ids) >= begin + size]
    return pieces[: given.per_domain]


def _measure(
    llm: LLM, prompts: Sequence[Sequence[int]], options: dict[str, Any], given: argparse.Namespace
) -> dict[str, float]:
    completions = llm.generate(
        list(prompts),
        stopping=StoppingParams(max_tokens=given.tokens, ignore_eos=True),
        sampling=[
            SamplingParams(temperature=given.temperature, seed=seed) for seed in range(len(prompts))
        ],
        sharing="private",
        **options,
    )
    agreements = [
        agreement(
            llm.model.decoder,
            prompt,
            each.token_ids,
            SamplingParams(temperature=given.temperature, seed=seed),
        )
        for seed, (prompt, each) in enumerate(zip(prompts, completions, strict=True))
    ]
    figures: list[PruningFigures] = [each.pruning for each in completions]
    return {
        "density": round(mean(each.mean_density for each in figures), 3),
        "below": round(mean(each < given.floor for each in agreements), 3),
        "agreement": round(mean(agreements), 3),
        "worst": round(min(agreements), 3),
        "checked": sum(each.checked_tokens for each in figures),
    }


if __name__ == "__main__":
    main()
