"""KL from the dense model by recipe and domain, on texts that a calibration has not seen.

    python -m griffin_evals.recipe_study --data FOLDER [--model MODEL] [--recipe NAME ...]

A text's first tokens are the prompt that chooses the experts; the tokens after it are given, not
drawn, to the dense and the pruned model. Recipes are compared with the first one, on the same
windows, ± one standard error. With --warmup-tokens every recipe runs once more, with so many tokens
after the prompt dense and among those that choose; only the tokens after them count, for all.
Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from griffin_core.calibration.recipes import compare, divergences
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import load_model
from griffin_core.spec.calibration import Recipe
from griffin_core.spec.choices import DEFAULT_MODEL
from griffin_evals.recipes import parse_recipe
from griffin_evals.study.corpus import load_corpus

RECIPES = ("topk", "topk+bias", "topk+residual64", "topk+residual128", "sensitive+residual64")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--data", type=Path, help="folder of DOMAIN.jsonl or DOMAIN/*.txt")
    parser.add_argument("--only", nargs="+", help="domains; default all")
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES))
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--scored-tokens", type=int, default=96)
    parser.add_argument("--warmup-tokens", type=int, default=0)
    parser.add_argument("--per-domain", type=int, default=6)
    parser.add_argument("--calibration", help="a file of griffin calibrate; default as serve")
    given = parser.parse_args()
    recipes = {name: _recipe(name) for name in given.recipe}
    model = load_model(
        given.model, dtype=torch.float32, calibration=given.calibration, progress=print
    )
    corpus = load_corpus(given.data)
    domains = given.only or list(corpus)
    length = given.prompt_tokens + given.warmup_tokens + given.scored_tokens
    found: dict[str, list[Mapping[str, float]]] = {}
    for domain in domains:
        encoded = (model.tokenizer.encode(text) for text in corpus[domain].values())
        windows = [ids[:length] for ids in encoded if len(ids) >= length][: given.per_domain]
        found[domain] = [_divergences(model.decoder, window, recipes, given) for window in windows]
        print(f"{domain}: {len(windows)} windows", flush=True)
    _report(found)


def _recipe(name: str) -> Recipe:
    named = parse_recipe(name)
    return Recipe(policy=named.policy, correction=named.correction, rank=named.rank)


def _divergences(
    decoder: Decoder, window: Sequence[int], recipes: Mapping[str, Recipe], given: Namespace
) -> dict[str, float]:
    """Returns the mean KL of the tokens that count, by recipe, without and with the warm-up."""
    prompt, warmup = given.prompt_tokens, given.warmup_tokens
    kls: dict[str, float] = {}
    for before in dict.fromkeys((0, warmup)):
        by_recipe = divergences(
            decoder,
            window,
            prompt + before,
            given.density,
            list(recipes.values()),
            skipped=warmup - before,
        )
        after = f" after {before}" if before else ""
        kls |= {f"{name}{after}": by_recipe[recipe] for name, recipe in recipes.items()}
    return kls


def _report(found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    everywhere = [window for windows in found.values() for window in windows]
    first = next(iter(everywhere[0]))
    overall = compare(everywhere, first)
    by_domain = {name: compare(own, first) for name, own in found.items() if len(own) > 1}
    for place, each in enumerate(overall):
        domains = ", ".join(
            f"{domain} {100 * own[place].change:+.0f}" for domain, own in by_domain.items()
        )
        change = f"{100 * each.change:+.1f} ± {100 * each.change_error:.1f} %"
        print(f"{each.recipe:32} KL {each.kl:.3f}  {change:16} {domains}")
    print(json.dumps({"windows": len(everywhere), "recipes": [asdict(each) for each in overall]}))


if __name__ == "__main__":
    main()
