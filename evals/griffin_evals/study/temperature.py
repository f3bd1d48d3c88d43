"""Whether completions at higher temperatures use other neurons than the prompt's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from griffin_core.calibration.forced_text import forced
from griffin_evals.study.drift import AT_ONCE
from griffin_evals.study.estimates import estimate, paired
from griffin_evals.study.lab import Lab
from griffin_evals.study.measures import (
    distinct_share,
    divergence,
    members,
    norm_mass,
    overlap,
)
from griffin_evals.study.reading import choose, generate, logprobs_of, on_experts, read

TEMPERATURES = (0.0, 0.7, 1.0, 1.3)
MEASURES = ("overlap", "norm_mass", "kl", "distinct")
TEXT = "text"
"""The kind of the text's own continuation, of the same length."""


def measure(lab: Lab) -> dict[str, Any]:
    """Measures completions by temperature, and the text's own continuation: the share of their
    experts that are the prompt's, the norm mass that these hold, and the KL to dense on them."""
    kinds = [str(temperature) for temperature in TEMPERATURES]
    found: dict[str, dict[str, list[float]]] = {
        kind: {measured: [] for measured in MEASURES} for kind in (*kinds, TEXT)
    }
    for begin in range(0, len(lab.texts), AT_ONCE):
        texts = lab.texts[begin : begin + AT_ONCE]
        prompts = [lab.prompt(text) for text in texts]
        seeds = range(begin, begin + len(texts))
        completions: dict[str, Sequence[Sequence[int]]] = {
            TEXT: [lab.continuation(text) for text in texts]
        }
        for temperature in TEMPERATURES:
            lab.progress(f"temperature {temperature}: texts {begin + 1} to {begin + len(texts)}")
            completions[str(temperature)] = generate(
                lab.model, prompts, lab.sizes.continuation_tokens, temperature, seeds
            )
        for number, prompt in enumerate(prompts):
            of_kinds = {kind: made[number] for kind, made in completions.items()}
            for kind, figures in _of(lab, prompt, of_kinds).items():
                for measured, value in figures.items():
                    found[kind][measured].append(value)
    return {
        "kinds": {
            name: {measured: estimate(values).to_json() for measured, values in rows.items()}
            for name, rows in found.items()
        },
        "above_text": {
            name: {
                measured: paired(rows[measured], found[TEXT][measured]).to_json()
                for measured in ("overlap", "kl")
            }
            for name, rows in found.items()
            if name != TEXT
        },
        "hottest_above_coldest": {
            measured: paired(
                found[str(TEMPERATURES[-1])][measured], found[str(TEMPERATURES[0])][measured]
            ).to_json()
            for measured in ("overlap", "kl")
        },
    }


def _of(
    lab: Lab, prompt: Sequence[int], completions: dict[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """The measures of each completion of one prompt."""
    decoder = lab.model.decoder
    width = decoder.spec.intermediate_size
    cache = decoder.new_cache(len(prompt) + max(len(ids) for ids in completions.values()))
    experts = choose(decoder, read(decoder, prompt, cache).s2, lab.selection)
    chosen, view = members(experts, width), on_experts(decoder, experts)
    figures = {}
    for kind, ids in completions.items():
        follows = read(decoder, ids, cache)
        cache.rewind(len(prompt))
        slim = forced(decoder, ids, cache, view)
        own = choose(decoder, follows.s2, lab.selection)
        figures[kind] = {
            "overlap": overlap(members(own, width), chosen),
            "norm_mass": float(norm_mass(follows.s2, experts).mean()),
            "kl": float(divergence(logprobs_of(decoder, follows.hidden), slim).mean()),
            "distinct": distinct_share(ids),
        }
    return figures
