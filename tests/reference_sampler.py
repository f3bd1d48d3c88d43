"""The probabilities of a draw, in float64 and by sorting, for tests of the samplers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_core.sampling.params import SamplingParams


def shaped(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    banned: Sequence[int],
) -> Tensor:
    """Logits [V] with biases and penalties, float64; -infinity for tokens that are not to be drawn.

    Args:
        prompt, output: the tokens before, and those that were drawn.
    """
    logits = logits.double().clone()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    times = torch.zeros_like(logits)
    for token in output:
        times[token] += 1
    for token in {*prompt, *output}:
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    logits -= params.presence_penalty * (times > 0) + params.frequency_penalty * times
    allowed = params.allowed_token_ids or range(len(logits))
    never = [t for t in range(len(logits)) if t not in allowed or t in banned]
    return logits.index_fill_(0, torch.tensor(never, dtype=torch.int64), -torch.inf)


def probabilities(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    banned: Sequence[int] = (),
) -> Tensor:
    """Of each token, [V] float64."""
    x = shaped(logits, params, prompt, output, banned)
    if params.temperature == 0:
        return torch.zeros_like(x).index_fill_(0, x.argmax(), 1.0)
    ranked, order = x.sort(descending=True, stable=True)
    # Shifted first: x / 1e-320 is infinite, 0 / 1e-320 is not.
    kept = truncate(
        ((ranked - ranked[0]) / params.temperature).softmax(dim=0),
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )
    return torch.zeros_like(x).scatter_(0, order, kept)


def truncate(ranked: Tensor, *, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Of probabilities [V] in falling order, keeps the k first, then the fewest that reach top_p,
    then those at least min_p times as likely as the first; renormalized. At least one stays."""
    ranked = ranked.clone()
    if top_k:
        ranked[top_k:] = 0
        ranked /= ranked.sum()
    if top_p < 1:
        before = ranked.cumsum(dim=0) - ranked
        before[0] = 0
        ranked[before >= top_p] = 0
        ranked /= ranked.sum()
    ranked[ranked < min_p * ranked[0]] = 0
    return ranked / ranked.sum()


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """The probability of draws at least as far from a distribution as these are.

    Args:
        counts: [V], how often each token was drawn.
        expected: [V] float64, its probability. Tokens of less than five expected draws are counted
            together.
    """
    assert not counts[expected == 0].any(), "a token was drawn that cannot be"
    expected = expected * counts.sum()
    rare = expected < 5
    pairs = [(counts[~rare].double(), expected[~rare])]
    if float(expected[rare].sum()) > 0:
        pairs.append((counts[rare].sum()[None].double(), expected[rare].sum()[None]))
    seen, meant = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if len(meant) == 1:
        return 1.0
    statistic = ((seen - meant) ** 2 / meant).sum()
    freedom = torch.tensor((len(meant) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
