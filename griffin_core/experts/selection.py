"""The expert-selection stage: from the statistic of a prompt to what its generation runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from griffin_core.experts import densities
from griffin_core.experts.parameters import NO_PARAMETERS, SelectionParameters
from griffin_core.experts.policies import POLICIES, Choice, PolicyName, choose
from griffin_core.experts.slim_spec import SlimSpec


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How the experts of a request are chosen.

    Args:
        density: the fraction of neurons to keep, in (0, 1].
        policy: one of ``POLICIES``.
        parameters: what a request may say beside these.
        seed: for policies that draw at random, in [0, 2**64).

    Raises:
        ValueError: the density or the policy is none of these.
        InvalidRequest: the policy has no such parameter.
    """

    density: float
    policy: PolicyName = "topk"
    parameters: SelectionParameters = NO_PARAMETERS
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density: got {self.density}; allowed: (0, 1]")
        if self.policy not in POLICIES:
            raise ValueError(f"policy: got {self.policy!r}; allowed: {', '.join(POLICIES)}")
        self.parameters.check(self.policy)
        # With the defaults, so that selections that choose alike are equal.
        object.__setattr__(self, "parameters", self.parameters.of(self.policy))

    @property
    def kind(self) -> Selection:
        """What sessions that share an expert set have in common: everything but the seed."""
        return replace(self, seed=0)

    def expert_counts(self, layers: int, intermediate_size: int) -> tuple[int, ...]:
        """Returns K of each layer."""
        return densities.expert_counts(self.density, self.parameters, layers, intermediate_size)


Magnitude = Callable[[], Tensor]
"""Returns the layers' static strengths [L, F]; called only if a policy needs them."""


def select_experts(s2: Tensor, selection: Selection, *, magnitude: Magnitude) -> SlimSpec:
    """Chooses the experts of all layers from their statistic s2 [L, F].

    The result depends only on the arguments, and a layer's experts only on that layer's s2: random
    draws are seeded by request and layer.
    """
    return select_together([s2], [selection], magnitude=magnitude)[0]


SELECTED_TOGETHER = 8
"""The most prompts whose experts are chosen in one batch. Sorting takes about 25 bytes per prompt,
layer and neuron: 11 MB per prompt for Llama-3-8B."""


def select_together(
    s2s: Sequence[Tensor], selections: Sequence[Selection], *, magnitude: Magnitude
) -> list[SlimSpec]:
    """Does the same as ``select_experts`` for several requests at once.

    Requests whose policy uses only s2 share batches if they have equal counts.

    Args:
        s2s: [L, F] for each request.
        selections: of each request.
    """
    alike: dict[object, list[int]] = {}
    counts = [each.expert_counts(*s2.shape) for s2, each in zip(s2s, selections, strict=True)]
    for index, selection in enumerate(selections):
        alone = selection.policy != "topk"
        alike.setdefault(index if alone else counts[index], []).append(index)
    chosen: dict[int, SlimSpec] = {}
    for same in alike.values():
        for begin in range(0, len(same), SELECTED_TOGETHER):
            indices = same[begin : begin + SELECTED_TOGETHER]
            selection, own = selections[indices[0]], counts[indices[0]]
            choice = Choice(
                s2=s2s[indices[0]] if len(indices) == 1 else torch.cat([s2s[i] for i in indices]),
                counts=own * len(indices),
                seed=selection.seed,
                parameters=selection.parameters,
                magnitude=magnitude,
            )
            experts = choose(selection.policy, choice).chunk(len(indices))
            for index, each in zip(indices, experts, strict=True):
                intermediate_size = s2s[index].shape[1]
                chosen[index] = SlimSpec(
                    intermediate_size=intermediate_size, counts=own, experts=each
                )
    return [chosen[index] for index in range(len(s2s))]
