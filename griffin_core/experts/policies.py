"""Selection policies: which neurons of a layer become experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

from griffin_core.backends.transfers import on_device
from griffin_core.experts.densities import counts_by_score
from griffin_core.experts.parameters import SelectionParameters
from griffin_core.experts.statistic import Statistics
from griffin_core.spec import choices
from griffin_core.spec.calibration import PRIOR_TOKENS, Calibration

PolicyName = choices.PolicyName
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a policy chooses from.

    Args:
        statistics: of the prompt.
        count: the mean number of experts of a layer.
        seed: for policies that draw at random, in [0, 2**64).
        magnitude: returns the layers' static strengths [L, F], see ``FFWeights.magnitude``. Called
            only by policies that need them.
        calibration: of the model; only policies of ``CALIBRATED_POLICIES`` read it.
    """

    statistics: Statistics
    count: int
    seed: int
    parameters: SelectionParameters
    magnitude: Callable[[], Tensor]
    calibration: Calibration | None = None

    @property
    def s2(self) -> Tensor:
        """[L, F] float32, the paper's statistic of the prompt."""
        return self.statistics.s2


class SelectionPolicy(Protocol):
    """Ranks the neurons of each layer."""

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
    ranked = math.ceil(round(choice.count * share, 6))
    by_rank = torch.arange(choice.s2.shape[1], device=choice.s2.device) < ranked
    by_rank = by_rank.expand(choice.s2.shape)
    first = by_rank.scatter(1, _ranking(choice.s2), by_rank)
    return sampled(choice).masked_fill(first, torch.inf)


def magnitude(choice: Choice) -> Tensor:
    """Takes the neurons with the largest weights, independent of the prompt. A baseline."""
    return choice.magnitude()


def random(choice: Choice) -> Tensor:
    """Draws uniformly. A baseline."""
    return _uniform(choice, torch.float32)


def sensitive(choice: Choice) -> Tensor:
    """Takes the neurons whose mean square, times the square of the gradient, is largest: what a
    second-order expansion says the model loses with each (the Fisher information; as in FLAP, arXiv
    2312.11983, and Theis et al., 1801.05787, but from the prompt). The prior holds the means of
    short prompts. Scores compare between layers, which therefore have different counts."""
    calibration = _calibrated(choice)
    tokens = choice.statistics.tokens + PRIOR_TOKENS
    mean = (choice.statistics.squares + PRIOR_TOKENS * calibration.mean_squares) / tokens
    return mean * calibration.sensitivity


BY_NAME: dict[PolicyName, SelectionPolicy] = {
    "topk": topk,
    "sampled": sampled,
    "topk_sampled": topk_sampled,
    "magnitude": magnitude,
    "random": random,
    "sensitive": sensitive,
    "topk_budgets": topk,
}


def counts_of(policy: PolicyName, choice: Choice, score: Tensor) -> tuple[int, ...]:
    """Returns K of each layer. All policies keep the same number of neurons in all.

    Args:
        score: [L, F], by which the policy ranks.
    """
    match policy:
        case "sensitive":
            return counts_by_score(score, choice.count)
        case "topk_budgets":
            return counts_by_score(_calibrated(choice).importance, choice.count)
        case _:
            return (choice.count,) * len(score)


def choose(policy: PolicyName, choice: Choice) -> tuple[Tensor, tuple[int, ...]]:
    """Chooses the experts of all layers: [ΣK] int32, layer after layer, ascending in each layer;
    and K of each layer."""
    score = BY_NAME[policy](choice)
    counts = counts_of(policy, choice, score)
    return largest(score, counts).to(choice.s2.device), counts


def _calibrated(choice: Choice) -> Calibration:
    assert choice.calibration is not None, "checked before a prompt is read"
    return choice.calibration


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
