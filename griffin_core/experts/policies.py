"""Selection policies: which neurons of a layer become experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

from griffin_core.backends.transfers import on_device
from griffin_core.experts.parameters import SelectionParameters
from griffin_core.spec import choices

PolicyName = choices.PolicyName
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a policy chooses from.

    Args:
        s2: [L, F] float32, the statistic of the prompt, or any score in the same order.
        counts: K of each layer.
        seed: for policies that draw at random, in [0, 2**64).
        magnitude: returns the layers' static strengths [L, F], see ``FFWeights.magnitude``. Called
            only by policies that need them.
    """

    s2: Tensor
    counts: tuple[int, ...]
    seed: int
    parameters: SelectionParameters
    magnitude: Callable[[], Tensor]


class SelectionPolicy(Protocol):
    """Ranks the neurons of each layer, independently of other layers."""

    def __call__(self, choice: Choice) -> Tensor:
        """Returns a score [L, F] on any device: a layer's experts are its K neurons of the highest
        score, and ties go to the lower index."""
        ...


def topk(choice: Choice) -> Tensor:
    """Takes the neurons with the largest s: the paper's method. Since ties go to the lower index,
    the same prompt has the same experts everywhere."""
    return choice.s2


def sampled(choice: Choice) -> Tensor:
    """Draws without replacement, with weights s (Efraimidis and Spirakis, 2006, as log weight plus
    Gumbel noise). Neurons of weight 0 come last, by index."""
    uniform = _uniform(choice, torch.float64)
    return 0.5 * torch.log(choice.s2.double()) - torch.log(-torch.log(uniform))


def topk_sampled(choice: Choice) -> Tensor:
    """Takes ``topk_share`` of the experts by ``topk`` and draws the others by ``sampled``."""
    share = choice.parameters.topk_share
    assert share is not None, "a selection has the defaults of its policy"
    # Rounded first, as for a density: 100 * 0.29 is 28.999999999999996.
    ranked = [math.ceil(round(k * share, 6)) for k in choice.counts]
    device, neurons = choice.s2.device, choice.s2.shape[1]
    before = on_device(ranked, torch.int64, device)[:, None]
    by_rank = torch.arange(neurons, device=device) < before
    first = by_rank.scatter(1, _ranking(choice.s2), by_rank)
    return sampled(choice).masked_fill(first, torch.inf)


def magnitude(choice: Choice) -> Tensor:
    """Takes the neurons with the largest weights, independent of the prompt. A baseline."""
    return choice.magnitude()


def random(choice: Choice) -> Tensor:
    """Draws uniformly. A baseline."""
    return _uniform(choice, torch.float32)


BY_NAME: dict[PolicyName, SelectionPolicy] = {
    "topk": topk,
    "sampled": sampled,
    "topk_sampled": topk_sampled,
    "magnitude": magnitude,
    "random": random,
}


def choose(policy: PolicyName, choice: Choice) -> Tensor:
    """Chooses the experts of all layers: [ΣK] int32, layer after layer, ascending in each layer."""
    return largest(BY_NAME[policy](choice), choice.counts).to(choice.s2.device)


def largest(score: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns the indices of the K largest values in each row of score [L, F], row after row,
    ascending in each row: [ΣK] int32. Ties go to the lower index."""
    layers, neurons = score.shape
    most = max(counts)
    if min(counts) == neurons:
        return torch.arange(most, dtype=torch.int32, device=score.device).repeat(layers)
    order = _ranking(score)[:, :most]
    if min(counts) == most:
        return order.sort(dim=1).values.int().flatten()
    ends = on_device(counts, torch.int64, score.device)[:, None]
    surplus = torch.arange(most, device=score.device) >= ends
    rows = order.masked_fill(surplus, neurons).sort(dim=1).values.int()
    return torch.cat([row[:k] for row, k in zip(rows, counts, strict=True)])


def _ranking(score: Tensor) -> Tensor:
    """Returns the indices of each row of score [L, F] from the largest value to the smallest."""
    return torch.sort(score, dim=1, descending=True, stable=True).indices


def _uniform(choice: Choice, dtype: torch.dtype) -> Tensor:
    """Returns random numbers in [0, 1) for every neuron, [L, F]. They are drawn on the CPU, seeded
    by request and layer."""
    layers, neurons = choice.s2.shape
    rows = []
    for layer in range(layers):
        seed = (choice.seed + layer * 0x9E3779B97F4A7C15) % 2**64
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(neurons, generator=generator, dtype=dtype))
    return torch.stack(rows).to(choice.s2.device)
