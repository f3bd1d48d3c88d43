"""How well a prompt's experts fit later text: windows at growing distances after it."""

from __future__ import annotations

from typing import Any

import torch

from griffin_evals.study.estimates import band, paired
from griffin_evals.study.lab import Lab, Text
from griffin_evals.study.measures import distinct_share, divergence, members, overlap
from griffin_evals.study.reading import advance, choose, generate, logprobs_of, on_experts, read

TEMPERATURE = 0.7
AT_ONCE = 32
"""Completions that are generated together: each holds a KV cache."""


def measure(lab: Lab) -> dict[str, Any]:
    """The share of each later window's experts that are the prompt's, in long texts and in texts
    that the model generates. In long texts also the KL to dense on the prompt's experts, where
    each of the two models computes its own keys and values."""
    figures: dict[str, Any] = {"generated": _generated(lab)}
    if lab.long_texts:
        figures["long"] = _long(lab)
    return figures


def _long(lab: Lab) -> dict[str, Any]:
    overlaps, kls = [], []
    for text in lab.each_text("drift, long", lab.long_texts):
        shares, divergences = _windows(lab, text)
        overlaps.append(shares)
        kls.append(divergences)
    window, count = lab.sizes.follow_tokens, len(overlaps[0])
    return {
        "distance": [window * i for i in range(count)],
        "overlap": band(overlaps),
        "kl_distance": [window * i for i in judged(count)],
        "kl": band(kls),
        "overlap_change": _last_less_first(overlaps),
        "kl_change": _last_less_first(kls),
    }


@torch.inference_mode()
def _windows(lab: Lab, text: Text) -> tuple[list[float], list[float]]:
    decoder, size = lab.model.decoder, lab.sizes.follow_tokens
    prompt = text.token_ids[: lab.sizes.prompt_tokens]
    rest = text.token_ids[len(prompt) : -1]
    dense_cache, slim_cache = (decoder.new_cache(len(text.token_ids)) for _ in range(2))
    experts = choose(decoder, read(decoder, prompt, dense_cache).s2, lab.selection)
    read(decoder, prompt, slim_cache)
    view = on_experts(decoder, experts)
    chosen = members(experts, decoder.spec.intermediate_size)
    at = judged(len(rest) // size)
    shares, kls = [], []
    for begin in range(0, len(rest) - size + 1, size):
        ids = rest[begin : begin + size]
        dense = read(decoder, ids, dense_cache)
        slim = advance(decoder, ids, slim_cache, view)
        own = members(choose(decoder, dense.s2, lab.selection), decoder.spec.intermediate_size)
        shares.append(overlap(own, chosen))
        if len(shares) - 1 in at:
            kl = divergence(logprobs_of(decoder, dense.hidden), logprobs_of(decoder, slim))
            kls.append(float(kl.mean()))
    return shares, kls


def judged(windows: int) -> list[int]:
    """The windows whose KL is measured: the first, then each at twice the distance, and the last,
    since the head of a large vocabulary takes longer than the layers."""
    return sorted({0, windows - 1, *(2**i for i in range(windows.bit_length()) if 2**i < windows)})


def _generated(lab: Lab) -> dict[str, Any]:
    decoder, size = lab.model.decoder, lab.sizes.follow_tokens
    overlaps, distinct = [], []
    for begin in range(0, len(lab.texts), AT_ONCE):
        texts = lab.texts[begin : begin + AT_ONCE]
        lab.progress(f"drift, generated: texts {begin + 1} to {begin + len(texts)}")
        prompts = [lab.prompt(text) for text in texts]
        seeds = range(begin, begin + len(texts))
        made = generate(lab.model, prompts, lab.sizes.generated_tokens, TEMPERATURE, seeds)
        for prompt, ids in zip(prompts, made, strict=True):
            cache = decoder.new_cache(len(prompt) + len(ids))
            of_prompt = choose(decoder, read(decoder, prompt, cache).s2, lab.selection)
            chosen = members(of_prompt, decoder.spec.intermediate_size)
            row = []
            for start in range(0, len(ids) - size + 1, size):
                s2 = read(decoder, ids[start : start + size], cache).s2
                own = members(choose(decoder, s2, lab.selection), decoder.spec.intermediate_size)
                row.append(overlap(own, chosen))
            overlaps.append(row)
            distinct.append(
                [
                    distinct_share(ids[start : start + size])
                    for start in range(0, len(ids) - size + 1, size)
                ]
            )
    return {
        "distance": [size * i for i in range(len(overlaps[0]))],
        "temperature": TEMPERATURE,
        "overlap": band(overlaps),
        "distinct": band(distinct),
        "overlap_change": _last_less_first(overlaps),
    }


def _last_less_first(rows: list[list[float]]) -> dict[str, Any]:
    """The last window minus the first."""
    return paired([row[-1] for row in rows], [row[0] for row in rows]).to_json()
