"""KL from the dense model by recipe and domain, on texts that a calibration has not seen.

    python -m griffin_evals.recipe_study --data FOLDER [--model MODEL] [--recipe NAME ...]

A text's first tokens are the prompt that chooses the experts; the tokens after it are given, not
drawn, to the dense and the pruned model. Recipes are compared with the first one, on the same
windows, ± one standard error. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from griffin_core.calibration.recipes import compare, divergences
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
    parser.add_argument("--per-domain", type=int, default=6)
    parser.add_argument("--calibration", help="a file of griffin calibrate; default as serve")
    given = parser.parse_args()
    recipes = [_recipe(name) for name in given.recipe]
    model = load_model(
        given.model, dtype=torch.float32, calibration=given.calibration, progress=print
    )
    corpus = load_corpus(given.data)
    domains = given.only or list(corpus)
    length = given.prompt_tokens + given.scored_tokens
    found: dict[str, list[Mapping[Recipe, float]]] = {}
    for domain in domains:
        encoded = (model.tokenizer.encode(text) for text in corpus[domain].values())
        windows = [ids[:length] for ids in encoded if len(ids) >= length][: given.per_domain]
        found[domain] = [
            divergences(model.decoder, window, given.prompt_tokens, given.density, recipes)
            for window in windows
        ]
        print(f"{domain}: {len(windows)} windows", flush=True)
    _report(given.recipe, recipes, found)


def _recipe(name: str) -> Recipe:
    return Recipe(**parse_recipe(name)._asdict())


def _report(
    names: Sequence[str],
    recipes: Sequence[Recipe],
    found: Mapping[str, Sequence[Mapping[Recipe, float]]],
) -> None:
    everywhere = [window for windows in found.values() for window in windows]
    overall = compare(everywhere, recipes[0])
    by_domain = {name: compare(own, recipes[0]) for name, own in found.items() if len(own) > 1}
    for place, (name, each) in enumerate(zip(names, overall, strict=True)):
        domains = ", ".join(
            f"{domain} {100 * own[place].change:+.0f}" for domain, own in by_domain.items()
        )
        change = f"{100 * each.change:+.1f} ± {100 * each.change_error:.1f} %"
        print(f"{name:24} KL {each.kl:.3f}  {change:16} {domains}")
    figures = [{"name": name, **asdict(each)} for name, each in zip(names, overall, strict=True)]
    print(json.dumps({"windows": len(everywhere), "recipes": figures}))


if __name__ == "__main__":
    main()
