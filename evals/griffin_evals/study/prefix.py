"""How well experts chosen from the first n tokens fit the text that follows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from griffin_core.calibration.forced_text import forced
from griffin_evals.study.estimates import band, estimate, paired
from griffin_evals.study.lab import Lab, Text
from griffin_evals.study.measures import divergence, members, overlap
from griffin_evals.study.reading import choose, logprobs_of, on_experts, read


def measure(lab: Lab) -> dict[str, Any]:
    """Measures, for short and long texts, the KL to dense of the continuation, and the share of the
    continuation's own experts that the first n tokens choose."""
    figures = {"short": _of_texts(lab, lab.texts, lab.sizes.prompt_tokens, "prefix")}
    if lab.long_texts:
        figures["long"] = _of_texts(lab, lab.long_texts, lab.long_tokens, "prefix, long")
    return figures


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... and ``most`` itself."""
    powers = [1]
    while powers[-1] * 2 < most:
        powers.append(powers[-1] * 2)
    return [*powers, most] if most > 1 else powers


def _of_texts(lab: Lab, texts: Sequence[Text], prompt_tokens: int, name: str) -> dict[str, Any]:
    lengths = powers_of_two(prompt_tokens)
    overlaps, kls = [], []
    for text in lab.each_text(name, texts):
        by_length = _of_text(lab, text, lengths)
        overlaps.append([pair[0] for pair in by_length])
        kls.append([pair[1] for pair in by_length])
    quarter = max(i for i, n in enumerate(lengths) if n <= max(1, prompt_tokens // 4))
    return {
        "tokens": lengths,
        "overlap": band(overlaps),
        "kl": band(kls),
        "of_quarter": lengths[quarter],
        "whole": estimate([row[-1] for row in kls]).to_json(),
        "quarter_above_whole": paired(
            [row[quarter] for row in kls], [row[-1] for row in kls]
        ).to_json(),
        "first_above_whole": paired([row[0] for row in kls], [row[-1] for row in kls]).to_json(),
    }


def _of_text(lab: Lab, text: Text, lengths: Sequence[int]) -> list[tuple[float, float]]:
    """Overlap and KL for each length. The whole prompt runs dense each time, so its keys and values
    are the same, and only the choice of experts differs."""
    decoder = lab.model.decoder
    prompt, rest = text.token_ids[: lengths[-1]], text.token_ids[lengths[-1] : -1]
    cache = decoder.new_cache(len(text.token_ids))
    sums: list[Tensor] = []
    for begin, end in pairwise([0, *lengths]):
        span = read(decoder, prompt[begin:end], cache)
        sums.append(span.s2 if not sums else sums[-1] + span.s2)
    follows = read(decoder, rest, cache)
    cache.rewind(len(prompt))
    dense = logprobs_of(decoder, follows.hidden)
    width = decoder.spec.intermediate_size
    own = members(choose(decoder, follows.s2, lab.selection), width)
    found = []
    for s2 in sums:
        experts = choose(decoder, s2, lab.selection)
        slim = forced(decoder, rest, cache, on_experts(decoder, experts))
        kl = float(divergence(dense, slim).mean())
        found.append((overlap(own, members(experts, width)), kl))
    return found
