"""Selection policies: which neurons of a layer become experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

PolicyName = Literal["topk", "sampled", "topk_sampled", "magnitude", "random"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


class SelectionPolicy(Protocol):
    """Chooses the experts of one layer."""

    def select(self, s2: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """s2 [F] (or any score that orders as it does) -> k distinct indices, ascending int32.

        Args:
            generator: used by policies that draw.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How the experts of a request are chosen.

    Args:
        density: fraction of neurons kept, in (0, 1].
        policy: one of ``POLICIES``.
        seed: for the policies that draw, in [0, 2**64).
    """

    density: float
    policy: PolicyName = "topk"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density: got {self.density}; allowed: (0, 1]")
        if self.policy not in POLICIES:
            raise ValueError(f"policy: got {self.policy!r}; allowed: {', '.join(POLICIES)}")

    def experts_of(self, ff_width: int) -> int:
        """K = max(1, floor(F · density))."""
        # Rounded first: 100 * 0.29 is 28.999999999999996, and 29 is meant.
        return max(1, math.floor(round(ff_width * self.density, 6)))


def select_experts(
    s2: Tensor, selection: Selection, *, layer: int, magnitude: Callable[[], Tensor]
) -> Tensor:
    """The stage: one layer's s2 [F] -> its expert set [K], ascending int32.

    Depends on its arguments alone: a draw is seeded by request and layer, so layers may be
    selected in any order and on any machine.

    Args:
        magnitude: gives the layer's static strengths [F], asked for only if the policy needs it.
    """
    generator = torch.Generator().manual_seed((selection.seed + layer * 0x9E3779B97F4A7C15) % 2**64)
    k = selection.experts_of(s2.shape[0])
    return _policy(selection.policy, magnitude).select(s2, k, generator)


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
    """The k neurons of largest s; ties go to the lower index, so that the same prompt has the
    same experts everywhere. The paper's method."""

    def select(self, s2: Tensor, k: int, generator: torch.Generator) -> Tensor:
        return _largest(s2, k)


class Sampled:
    """k neurons drawn without replacement with weights s."""

    def select(self, s2: Tensor, k: int, generator: torch.Generator) -> Tensor:
        return _largest(_sampling_keys(s2, generator), k)


class TopKSampled:
    """The ceil(k / 2) neurons of largest s, the others drawn as by ``Sampled`` from the rest."""

    def select(self, s2: Tensor, k: int, generator: torch.Generator) -> Tensor:
        keys = _sampling_keys(s2, generator)
        keys[_largest(s2, k - k // 2).long()] = torch.inf
        return _largest(keys, k)


class Magnitude:
    """The k neurons of largest weights: static, the prompt has no say. A baseline.

    Args:
        strengths: [F], see ``FeedForward.magnitude``.
    """

    def __init__(self, strengths: Tensor) -> None:
        self._strengths = strengths

    def select(self, s2: Tensor, k: int, generator: torch.Generator) -> Tensor:
        return _largest(self._strengths, k)


class Random:
    """k neurons drawn uniformly. A baseline."""

    def select(self, s2: Tensor, k: int, generator: torch.Generator) -> Tensor:
        return _largest(torch.rand(s2.shape[0], generator=generator), k).to(s2.device)


def _largest(score: Tensor, k: int) -> Tensor:
    """Ascending int32 indices of the k largest of score [F]; of equals, those of lower index."""
    order = torch.sort(score, descending=True, stable=True).indices[:k]
    return order.sort().values.int()


def _sampling_keys(s2: Tensor, generator: torch.Generator) -> Tensor:
    """Keys whose k largest are a draw without replacement with weights s (Efraimidis and Spirakis,
    2006, as log weight plus Gumbel noise). Neurons of weight 0 come last, by index."""
    uniform = torch.rand(s2.shape[0], generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform)).to(s2.device)
    return 0.5 * torch.log(s2.double()) + gumbel
