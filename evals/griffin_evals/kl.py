"""KL divergence from the dense model and agreement with it, for many selections on one text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from griffin_core.decode.step import StepTokens, decode_tokens
from griffin_core.experts.selection import Selection, select_experts
from griffin_core.kv_cache import KvCache
from griffin_core.model.load import Model
from griffin_core.prefill import LayerExperts, prefill
from griffin_core.slim.packed import Packed

PROMPT_TOKENS, SCORED_TOKENS = 384, 128
"""Of a window."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Of one window.

    Args:
        kl: mean KL(dense || pruned) over the scored tokens, in nats.
        agreement: share of them whose most likely next token is the dense model's.
    """

    kl: float
    agreement: float


def token_windows(token_ids: Sequence[int]) -> list[Sequence[int]]:
    """Windows of PROMPT_TOKENS + SCORED_TOKENS, without overlap; the rest is left out."""
    step = PROMPT_TOKENS + SCORED_TOKENS
    return [token_ids[at : at + step] for at in range(0, len(token_ids) - step + 1, step)]


@torch.inference_mode()
def divergences(
    model: Model, window: Sequence[int], prompt_tokens: int, selections: Sequence[Selection]
) -> Iterator[Divergence]:
    """One for each selection. The prompt is read once, dense; its statistic chooses the experts of
    each selection, on which the other tokens are teacher-forced."""
    decoder = model.decoder
    kv = decoder.new_cache(len(window))
    events = prefill(decoder, window[:prompt_tokens], Selection(density=1.0), cache=kv)
    s2 = torch.stack([event.s.square() for event in events if isinstance(event, LayerExperts)])
    rest = window[prompt_tokens:]
    magnitude = cache(decoder.magnitudes)
    dense = _logprobs(model, kv, prompt_tokens, [layer.ff for layer in decoder.layers], rest)
    chances, likeliest = dense.exp(), dense.argmax(dim=1)
    for selection in selections:
        experts = select_experts(s2, selection, magnitude=magnitude)
        layers = zip(decoder.layers, experts, strict=True)
        view = [Packed().build(layer, kept, "many") for layer, kept in layers]
        pruned = _logprobs(model, kv, prompt_tokens, view, rest)
        yield Divergence(
            kl=float((chances * (dense - pruned)).sum(dim=1).mean()),
            agreement=float((pruned.argmax(dim=1) == likeliest).double().mean()),
        )


def _logprobs(
    model: Model, kv: KvCache, start: int, view: Sequence[object], token_ids: Sequence[int]
) -> Tensor:
    """[T, V] float32: log-probabilities after each token, on a view, after the first ``start``
    tokens of the cache, which are all that it keeps."""
    kv.rewind(start)
    step = StepTokens(cache=kv, view=view, token_ids=token_ids)  # type: ignore[arg-type]
    return decode_tokens(model.decoder, [step])[0].float().log_softmax(dim=1)
