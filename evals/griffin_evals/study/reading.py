"""Runs a model for the study: reads dense with the statistic, runs on experts, generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_core.backends.base import RunFF
from griffin_core.experts.selection import Selection, select_experts
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.forward.decode import StepTokens, decode_tokens
from griffin_core.forward.events import (
    LayerActivations,
    LayerKv,
)
from griffin_core.forward.prefill import launch
from griffin_core.forward.prompt import (
    Part,
    Prompt,
)
from griffin_core.kv.cache import KvCache
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import Model
from griffin_core.slim.zeroed import ZeroedLayers


@dataclass(frozen=True, kw_only=True)
class Span:
    """A run of T tokens that was read dense.

    Args:
        s2: [L, F] float32, the statistic of these tokens alone.
        hidden: [T, D], output of the last layer.
        activations: L relative activations [T, F] float32, if they were asked for.
    """

    s2: Tensor
    hidden: Tensor
    activations: tuple[Tensor, ...] = ()


@torch.inference_mode()
def read(
    decoder: Decoder, token_ids: Sequence[int], cache: KvCache, *, watch: bool = False
) -> Span:
    """Reads tokens dense after those in the cache, and appends them to it.

    Args:
        watch: keep the relative activations of all layers.
    """
    layers = range(len(decoder.layers)) if watch else ()
    prompt = Prompt(decoder, token_ids, Selection(density=1.0), cache=cache, watch=layers)
    kept: list[Tensor] = []

    def tell(_: Prompt, event: LayerKv | LayerActivations) -> None:
        if isinstance(event, LayerActivations):
            kept.append(event.values)

    done = launch(decoder, [Part(prompt=prompt, tokens=len(token_ids))], tell)
    done.end()
    return Span(s2=done.sums[0, 0], hidden=done.hidden, activations=tuple(kept))


@torch.inference_mode()
def logprobs_of(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Output of the last layer [T, D] -> log-probabilities [T, V] of the token after each."""
    return decoder.logits(hidden).log_softmax(dim=1)


def choose(decoder: Decoder, s2: Tensor, selection: Selection) -> Tensor:
    """The experts [L, K] int32 that a selection chooses from a statistic [L, F]. The study knows
    only selections that give all layers the same K."""
    return select_experts(s2, selection, magnitude=decoder.magnitudes).table


def on_experts(decoder: Decoder, experts: Tensor) -> Sequence[RunFF]:
    """The FF block of each layer on experts [L, K]. Activations outside are zeroed, which gives
    the results of packed copies without the time to make them."""
    return ZeroedLayers(
        decoder, SlimSpec.of_layers(decoder.spec.intermediate_size, experts.unbind())
    )


@torch.inference_mode()
def advance(
    decoder: Decoder, token_ids: Sequence[int], cache: KvCache, view: Sequence[RunFF]
) -> Tensor:
    """Runs tokens on a view without the head, and appends them to the cache: hidden [T, D]."""
    ids = torch.tensor(list(token_ids), device=decoder.device)
    hidden, attention = decoder.prepare_batch(ids, [(cache, len(token_ids))])
    for layer in range(len(decoder.layers)):
        hidden = decoder.layer(layer, hidden, attention, view[layer])
    cache.advance(len(token_ids))
    return hidden


@torch.inference_mode()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    temperature: float,
    seeds: Sequence[int],
) -> list[list[int]]:
    """Completes prompts dense, all at once, each by exactly ``tokens`` tokens: tokens that end a
    completion are never drawn.

    Args:
        temperature: 0 takes the most likely token.
        seeds: one for each prompt's draws.
    """
    decoder = model.decoder
    dense = [layer.ff for layer in decoder.layers]
    ends = torch.tensor(sorted(model.eos_ids), dtype=torch.int64, device=decoder.device)
    pool = decoder.new_pool(sum(len(prompt) + tokens for prompt in prompts))
    caches = [pool.allocate(len(prompt) + tokens) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    made: list[list[int]] = [[] for _ in prompts]
    hidden = [
        read(decoder, prompt, cache).hidden[-1:]
        for prompt, cache in zip(prompts, caches, strict=True)
    ]
    logits = decoder.head(decoder.final_hidden(torch.cat(hidden)))
    while True:
        logits[:, ends] = -torch.inf
        for row, (own, generator) in enumerate(zip(made, generators, strict=True)):
            own.append(draw(logits[row], temperature, generator))
        if len(made[0]) == tokens:
            return made
        step = [
            StepTokens(cache=cache, view=dense, token_ids=own[-1:])
            for cache, own in zip(caches, made, strict=True)
        ]
        logits = torch.cat(decode_tokens(decoder, step))


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """A token drawn from logits [V]; the most likely one at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    # By cumulative weights, since multinomial takes ten times as long for a large vocabulary.
    cumulated = (logits / temperature).softmax(dim=0).double().cumsum(dim=0)
    drawn = torch.rand(1, generator=generator, dtype=torch.float64) * cumulated[-1]
    return int(torch.searchsorted(cumulated, drawn, right=True).clamp_(max=len(cumulated) - 1))
