"""Our decoder at density 1 is transformers' model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from griffin_core.experts.selection import Selection
from griffin_core.forward.decode import StepTokens, decode_tokens
from griffin_core.forward.events import (
    LayerExperts,
    PrefillFinished,
)
from griffin_core.forward.prefill import prefill
from griffin_core.model.load import Model
from griffin_core.slim.masked import Masked
from tests.tiny import MODELS, VOCABULARY

STEPS = 32


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_tokens", [512, 5])
@torch.inference_mode()
def test_prefill_and_32_steps_give_transformers_logits(
    name: str,
    chunk_tokens: int,
    tiny: Callable[[str], Model],
    tiny_directory: Callable[[str], Path],
) -> None:
    decoder = tiny(name).decoder
    reference = AutoModelForCausalLM.from_pretrained(
        tiny_directory(name), dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (20 + STEPS,))
    expected = reference(ids[None]).logits[0]

    cache = decoder.new_cache(len(ids))
    events = prefill(
        decoder,
        ids[:20].tolist(),
        Selection(density=1.0),
        cache=cache,
        chunk_tokens=chunk_tokens,
    )
    finished = next(event for event in events if isinstance(event, PrefillFinished))
    logits = [decoder.head(finished.last_hidden[None])[0]]
    dense = [layer.ff for layer in decoder.layers]
    for token in ids[20:].tolist():
        step = StepTokens(cache=cache, view=dense, token_ids=[token])
        logits.append(decode_tokens(decoder, [step])[0][0])

    torch.testing.assert_close(torch.stack(logits), expected[19:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
@torch.inference_mode()
def test_half_density_equals_transformers_with_the_other_neurons_masked(
    name: str, tiny: Callable[[str], Model], tiny_directory: Callable[[str], Path]
) -> None:
    """The whole method against the reference: dense prompt, then experts only."""
    decoder = tiny(name).decoder
    torch.manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (24,))
    cache = decoder.new_cache(len(ids))
    events = list(prefill(decoder, ids[:16].tolist(), Selection(density=0.5), cache=cache))
    experts = [event.experts for event in events if isinstance(event, LayerExperts)]
    layers = zip(decoder.layers, experts, strict=True)
    view = [Masked().build(layer, kept, "gemm") for layer, kept in layers]
    step = StepTokens(cache=cache, view=view, token_ids=ids[16:].tolist())
    ours = decode_tokens(decoder, [step])[0]

    reference = AutoModelForCausalLM.from_pretrained(
        tiny_directory(name), dtype=torch.float32, attn_implementation="eager"
    )
    projections = [
        module
        for path, module in reference.named_modules()
        if path.endswith(("mlp.down_proj", ".fc2"))
    ]
    for projection, kept in zip(projections, experts, strict=True):
        mask = torch.zeros(len(ids), projection.in_features)
        mask[:16] = 1
        mask[16:, kept.long()] = 1
        projection.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
    expected = reference(ids[None]).logits[0, 16:]

    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
