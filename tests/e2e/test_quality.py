"""The right neurons are kept: on real text, divergence from the dense model by policy."""

from __future__ import annotations

import pytest
import torch

from griffin_core.decode.step import decode_tokens
from griffin_core.experts.selection import PolicyName, Selection
from griffin_core.model.load import Model
from griffin_core.prefill import LayerExperts, prefill
from griffin_core.slim.base import SlimView
from griffin_core.slim.packed import Packed
from tests.e2e.texts import ARTICLE, LICENCE

PROMPT, CONTINUATION = 384, 128


@torch.inference_mode()
def logprobs(model: Model, ids: list[int], selection: Selection) -> torch.Tensor:
    """[CONTINUATION, V] of the text behind the prompt, on the prompt's experts."""
    decoder = model.decoder
    cache = decoder.new_cache(len(ids))
    events = prefill(decoder, ids[:PROMPT], selection, cache=cache)
    experts = [event.experts for event in events if isinstance(event, LayerExperts)]
    layers = zip(decoder.layers, experts, strict=True)
    view = SlimView(layers=tuple(Packed().build(layer.ff, kept) for layer, kept in layers))
    hidden = decode_tokens(decoder, cache, view, torch.tensor(ids[PROMPT:]))
    return decoder.head(hidden).log_softmax(dim=1)


def divergence(model: Model, ids: list[int], policy: PolicyName) -> float:
    """Mean KL(dense || density 0.5) over the continuation, in nats."""
    dense = logprobs(model, ids, Selection(density=1.0))
    slim = logprobs(model, ids, Selection(density=0.5, policy=policy, seed=1))
    return float((dense.exp() * (dense - slim)).sum(dim=1).mean())


@pytest.mark.parametrize("text", [ARTICLE, LICENCE], ids=["article", "licence"])
def test_topk_diverges_less_than_a_third_of_what_magnitude_and_random_do(
    text: str, smollm2: Model
) -> None:
    ids = smollm2.tokenizer.encode(text)[: PROMPT + CONTINUATION]
    assert len(ids) == PROMPT + CONTINUATION
    topk = divergence(smollm2, ids, "topk")
    assert 0 < topk < divergence(smollm2, ids, "magnitude") / 3
    assert topk < divergence(smollm2, ids, "random") / 3
