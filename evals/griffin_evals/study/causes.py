"""What causes flocking: prompts whose order, tokens or positions are changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from griffin_evals.study.estimates import estimate, paired
from griffin_evals.study.lab import Lab, Text, leading_ids
from griffin_evals.study.measures import agreement, members, norm_mass, overlap, strongest
from griffin_evals.study.reading import choose, read

KINDS = ("natural", "shuffled", "random", "repeated", "joined", "moved")


def measure(lab: Lab) -> dict[str, Any]:
    """Agreement and norm mass of each kind of prompt, and the share of the natural prompt's experts
    that it chooses too. All are as long as the natural prompt and begin with the same BOS, but
    for the moved one, which has another text before it."""
    found: dict[str, dict[str, list[float]]] = {
        kind: {"agreement": [], "norm_mass": [], "overlap": []} for kind in KINDS
    }
    for number, text in enumerate(lab.each_text("causes")):
        partner = _partner(lab.texts, number)
        natural: Tensor | None = None
        for kind in KINDS:
            prefix, prompt = _prompt(lab, kind, text, partner, number)
            agreed, mass, chosen = _flock(lab, prefix, prompt)
            natural = chosen if natural is None else natural
            found[kind]["agreement"].append(agreed)
            found[kind]["norm_mass"].append(mass)
            found[kind]["overlap"].append(overlap(natural, chosen))
    return {
        "kinds": {
            kind: {name: estimate(values).to_json() for name, values in of_kind.items()}
            for kind, of_kind in found.items()
        },
        "above_natural": {
            kind: paired(found[kind]["agreement"], found["natural"]["agreement"]).to_json()
            for kind in KINDS[1:]
        },
    }


def _partner(texts: Sequence[Text], number: int) -> Text:
    """A text of another domain, a different one for each text; with one domain, another text."""
    others = [text for text in texts if text.domain != texts[number].domain] or list(texts)
    return others[(number * 7 + 1) % len(others)]


def _prompt(
    lab: Lab, kind: str, text: Text, partner: Text, seed: int
) -> tuple[Sequence[int], list[int]]:
    """The token ids before the prompt, and those of the prompt."""
    natural = list(lab.prompt(text))
    bos = list(leading_ids(lab.model.tokenizer))
    body = natural[len(bos) :]
    generator = torch.Generator().manual_seed(seed)
    match kind:
        case "shuffled":
            order = torch.randperm(len(body), generator=generator).tolist()
            return [], bos + [body[i] for i in order]
        case "random":
            vocabulary = lab.model.decoder.spec.vocab_size
            drawn = torch.randint(vocabulary, (len(body),), generator=generator).tolist()
            return [], bos + drawn
        case "repeated":
            which = int(torch.randint(len(body), (1,), generator=generator))
            return [], bos + [body[which]] * len(body)
        case "joined":
            half = len(body) // 2
            other = lab.prompt(partner)[len(bos) :]
            return [], bos + body[:half] + list(other[: len(body) - half])
        case "moved":
            return lab.prompt(partner), body
        case _:
            return [], natural


def _flock(lab: Lab, prefix: Sequence[int], prompt: list[int]) -> tuple[float, float, Tensor]:
    """Agreement and norm mass, means of layers, and the experts [L, F] bool, of the prompt's tokens
    alone."""
    decoder = lab.model.decoder
    cache = decoder.new_cache(len(prefix) + len(prompt))
    if prefix:
        read(decoder, prefix, cache)
    span = read(decoder, prompt, cache, watch=True)
    experts = choose(decoder, span.s2, lab.selection)
    agreed = [
        agreement(strongest(z, lab.experts), own)
        for z, own in zip(span.activations, experts, strict=True)
    ]
    mass = float(norm_mass(span.s2, experts).mean())
    return sum(agreed) / len(agreed), mass, members(experts, decoder.spec.intermediate_size)
