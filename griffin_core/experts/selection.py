"""Selection policies: which neurons of a layer become experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

from griffin_core.spec import choices

PolicyName = choices.PolicyName
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


class SelectionPolicy(Protocol):
    """Chooses the experts of all layers, each layer independently."""

    def select(self, s2: Tensor, k: int, seed: int) -> Tensor:
        """Takes s2 [L, F], or any score in the same order. Returns [L, k] int32: for each layer k
        distinct indices, ascending.

        Args:
            seed: used by policies that draw at random.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The parameters by which the experts of a request are chosen.

    Args:
        density: the fraction of neurons to keep, in (0, 1].
        policy: one of ``POLICIES``.
        seed: for policies that draw at random, in [0, 2**64).
    """

    density: float
    policy: PolicyName = "topk"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density: got {self.density}; allowed: (0, 1]")
        if self.policy not in POLICIES:
            raise ValueError(f"policy: got {self.policy!r}; allowed: {', '.join(POLICIES)}")

    def expert_counts(self, layers: int, ff_width: int) -> tuple[int, ...]:
        """Returns K for each layer."""
        return (self.experts_of(ff_width),) * layers

    def experts_of(self, ff_width: int) -> int:
        """Returns K = max(1, floor(F · density))."""
        # Rounded first: 100 * 0.29 is 28.999999999999996, but the user means 29.
        return max(1, math.floor(round(ff_width * self.density, 6)))


def select_experts(s2: Tensor, selection: Selection, *, magnitude: Callable[[], Tensor]) -> Tensor:
    """Runs the expert-selection stage: s2 [L, F] of all layers -> expert sets [L, K], ascending
    int32.

    The result depends only on the arguments, and a layer's set only on that layer's s2: random
    draws are seeded by request and layer.

    Args:
        magnitude: returns the layers' static strengths [L, F]; called only if the policy needs
            them.
    """
    k = selection.experts_of(s2.shape[1])
    return _policy(selection.policy, magnitude).select(s2, k, selection.seed)


SELECTED_TOGETHER = 8
"""The most prompts whose experts are chosen in one batch. Sorting takes about 25 bytes per prompt,
layer and neuron: 11 MB per prompt for Llama-3-8B."""


def select_together(
    s2s: Sequence[Tensor], selections: Sequence[Selection], *, magnitude: Callable[[], Tensor]
) -> list[Tensor]:
    """Runs the stage for several requests at once, with the same results as ``select_experts`` for
    each.

    Requests whose policy uses only s2 share batches if they have the same density.

    Args:
        s2s: [L, F] for each request.
        selections: the parameters of each request.
        magnitude: as for ``select_experts``.
    """
    chosen: dict[int, Tensor] = {}
    alike: dict[float, list[int]] = {}
    for index, (s2, selection) in enumerate(zip(s2s, selections, strict=True)):
        if selection.policy == "topk":
            alike.setdefault(selection.density, []).append(index)
        else:
            chosen[index] = select_experts(s2, selection, magnitude=magnitude)
    for same in alike.values():
        for begin in range(0, len(same), SELECTED_TOGETHER):
            indices = same[begin : begin + SELECTED_TOGETHER]
            batch = s2s[indices[0]] if len(indices) == 1 else torch.cat([s2s[i] for i in indices])
            experts = select_experts(batch, selections[indices[0]], magnitude=magnitude)
            chosen.update(zip(indices, experts.chunk(len(indices)), strict=True))
    return [chosen[index] for index in range(len(s2s))]


def _policy(name: PolicyName, magnitude: Callable[[], Tensor]) -> SelectionPolicy:
    match name:
        case "topk":
            return TopK()
        case "sampled":
            return Sampled()
        case "topk_sampled":
            return TopKSampled()
        case "magnitude":
            return Magnitude(magnitude())
        case "random":
            return Random()


class TopK:
    """Takes the k neurons with the largest s, the paper's method. Ties go to the lower index, so
    that the same prompt has the same experts everywhere."""

    def select(self, s2: Tensor, k: int, seed: int) -> Tensor:
        return _largest(s2, k)


class Sampled:
    """Draws k neurons without replacement, with weights s."""

    def select(self, s2: Tensor, k: int, seed: int) -> Tensor:
        return _largest(_sampling_keys(s2, seed), k)


class TopKSampled:
    """Takes the ceil(k / 2) neurons with the largest s, and draws the others like ``Sampled``."""

    def select(self, s2: Tensor, k: int, seed: int) -> Tensor:
        keys = _sampling_keys(s2, seed)
        keys.scatter_(1, _largest(s2, k - k // 2).long(), torch.inf)
        return _largest(keys, k)


class Magnitude:
    """Takes the k neurons with the largest weights, independent of the prompt. A baseline.

    Args:
        strengths: [L, F], see ``FFWeights.magnitude``.
    """

    def __init__(self, strengths: Tensor) -> None:
        self._strengths = strengths

    def select(self, s2: Tensor, k: int, seed: int) -> Tensor:
        return _largest(self._strengths, k)


class Random:
    """Draws k neurons uniformly. A baseline."""

    def select(self, s2: Tensor, k: int, seed: int) -> Tensor:
        return _largest(_uniform(s2, seed, torch.float32), k).to(s2.device)


def _largest(score: Tensor, k: int) -> Tensor:
    """Returns the ascending int32 indices [L, k] of the k largest values in each row of score [L,
    F]; ties go to the lower index."""
    if k == score.shape[1]:
        return torch.arange(k, dtype=torch.int32, device=score.device).repeat(score.shape[0], 1)
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :k]
    return order.sort(dim=1).values.int()


def _sampling_keys(s2: Tensor, seed: int) -> Tensor:
    """Returns keys whose k largest are a draw without replacement with weights s (Efraimidis and
    Spirakis, 2006, as log weight plus Gumbel noise). Neurons of weight 0 come last, by index."""
    gumbel = -torch.log(-torch.log(_uniform(s2, seed, torch.float64))).to(s2.device)
    return 0.5 * torch.log(s2.double()) + gumbel


def _uniform(s2: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """Returns random numbers in [0, 1) for every neuron of s2 [L, F], on the CPU."""
    rows = []
    for layer in range(s2.shape[0]):
        generator = torch.Generator().manual_seed((seed + layer * 0x9E3779B97F4A7C15) % 2**64)
        rows.append(torch.rand(s2.shape[1], generator=generator, dtype=dtype))
    return torch.stack(rows)
