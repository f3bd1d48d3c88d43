"""The expert-selection stage: from the statistics of a prompt to what its generation runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from griffin_core.errors import InvalidRequest
from griffin_core.experts.correction import (
    NO_CORRECTION,
    CorrectionParams,
    correction_params,
)
from griffin_core.experts.correction_fit import kind_for
from griffin_core.experts.densities import uniform_count
from griffin_core.experts.parameters import NO_PARAMETERS, SelectionParameters
from griffin_core.experts.policies import POLICIES, Choice, PolicyName, choose, largest
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics
from griffin_core.spec.calibration import Calibration, Recipe
from griffin_core.spec.choices import CALIBRATED_POLICIES, CorrectionKind

COUNT_SLACK = 64
"""What a layer's experts are rounded up to in a packed copy, at most. Memory is reserved before the
prompt says how many experts each layer has, so each layer is counted with that many more."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How the experts of a request are chosen, and what stands in for the other neurons.

    Args:
        density: the fraction of neurons to keep, in (0, 1].
        policy: one of ``POLICIES``.
        parameters: what a request may say beside these.
        correction: what is added to the output of the experts.
        warmup_tokens: a session runs dense until so many of its tokens have run, and they all
            choose; 0 for the prompt alone, however short, as in the paper.
        seed: for policies that draw at random, in [0, 2**64).

    Raises:
        ValueError: the density or the policy is none of these, or the warm-up is negative.
        InvalidRequest: the policy has no such parameter.
    """

    density: float
    policy: PolicyName = "topk"
    parameters: SelectionParameters = NO_PARAMETERS
    correction: CorrectionParams = NO_CORRECTION
    warmup_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup_tokens < 0:
            raise ValueError(f"warmup_tokens: got {self.warmup_tokens}; allowed: 0 or more")
        if not 0 < self.density <= 1:
            raise ValueError(f"density: got {self.density}; allowed: (0, 1]")
        if self.policy not in POLICIES:
            raise ValueError(f"policy: got {self.policy!r}; allowed: {', '.join(POLICIES)}")
        self.parameters.check(self.policy)
        # With the defaults, so that selections that choose alike are equal.
        object.__setattr__(self, "parameters", self.parameters.of(self.policy))

    @property
    def kind(self) -> Selection:
        """What sessions that share an expert set have in common: everything but the seed and the
        warm-up."""
        return replace(self, seed=0, warmup_tokens=0)

    def count(self, intermediate_size: int) -> int:
        """Returns the mean number of experts of a layer. It is known before the prompt is read."""
        return uniform_count(self.density, intermediate_size)

    def most_counts(self, layers: int, intermediate_size: int) -> tuple[int, ...]:
        """Returns counts by layer whose copies take at least as many bytes as those that the prompt
        will choose."""
        count = self.count(intermediate_size)
        if self.policy in CALIBRATED_POLICIES and count < intermediate_size:
            count = min(count + COUNT_SLACK, intermediate_size - 1)
        return (count,) * layers

    def correction_for(self, tokens: int) -> CorrectionParams:
        """Returns the correction that so many tokens of a prompt can be given. ``sensitive``, whose
        choice is held by a prior, gives a bias to few tokens too."""
        if self.density == 1:
            return NO_CORRECTION
        kind = kind_for(self.correction, tokens, prior=self.policy == "sensitive")
        return self.correction if kind == "residual" else CorrectionParams(kind=kind)

    def check(self, calibration: Calibration | None) -> None:
        """Raises InvalidRequest if the policy reads a calibration and the model has none."""
        if self.policy in CALIBRATED_POLICIES and calibration is None:
            others = [name for name in POLICIES if name not in CALIBRATED_POLICIES]
            raise InvalidRequest(
                "pruning.policy",
                f"{self.policy} for a model without a calibration",
                f"{', '.join(others)}; or run griffin calibrate",
            )


def default_selection(
    density: float,
    *,
    policy: PolicyName | None = None,
    correction: CorrectionKind | None = None,
    rank: int | None = None,
    warmup_tokens: int = 0,
    calibration: Calibration | None = None,
) -> Selection:
    """Returns the selection of requests that set nothing: what the arguments say, for the rest what
    the model's calibration found best, and without one the paper's policy with a bias.

    Raises:
        InvalidRequest: the model lacks the calibration that the policy reads, or the correction has
            no such rank.
    """
    recipe = Recipe(policy="topk", correction="bias")
    if calibration is not None:
        recipe = calibration.recipe
    base = CorrectionParams(kind=recipe.correction, rank=recipe.rank)
    selection = Selection(
        density=density,
        policy=policy or recipe.policy,
        correction=correction_params(base, correction, rank),
        warmup_tokens=warmup_tokens,
    )
    selection.check(calibration)
    return selection


Magnitude = Callable[[], Tensor]
"""Returns the layers' static strengths [L, F]; called only if a policy needs them."""


def select_experts(
    statistics: Statistics | Tensor,
    selection: Selection,
    *,
    magnitude: Magnitude,
    calibration: Calibration | None = None,
) -> SlimSpec:
    """Chooses the experts of all layers from their statistics, or from a score [L, F] alone.

    The result depends only on the arguments: random draws are seeded by request and layer. It has
    no correction.
    """
    if isinstance(statistics, Tensor):
        statistics = Statistics.of_score(statistics)
    return select_together([statistics], [selection], magnitude=magnitude, calibration=calibration)[
        0
    ]


SELECTED_TOGETHER = 8
"""The most prompts whose experts are chosen in one batch. Sorting takes about 25 bytes per prompt,
layer and neuron: 11 MB per prompt for Llama-3-8B."""


def select_together(
    statistics: Sequence[Statistics],
    selections: Sequence[Selection],
    *,
    magnitude: Magnitude,
    calibration: Calibration | None = None,
) -> list[SlimSpec]:
    """Does the same as ``select_experts`` for several requests at once.

    Requests of policy ``topk`` share batches if they have equal counts.

    Args:
        statistics: of each request.
        selections: of each request.
    """
    chosen: dict[int, SlimSpec] = {}
    alike: dict[int, list[int]] = {}
    for index, (own, selection) in enumerate(zip(statistics, selections, strict=True)):
        neurons = own.s2.shape[1]
        if selection.policy == "topk":
            alike.setdefault(selection.count(neurons), []).append(index)
            continue
        experts, counts = choose(
            selection.policy,
            Choice(
                statistics=own,
                count=selection.count(neurons),
                seed=selection.seed,
                parameters=selection.parameters,
                magnitude=magnitude,
                calibration=calibration,
            ),
        )
        chosen[index] = SlimSpec(intermediate_size=neurons, counts=counts, experts=experts)
    for count, same in alike.items():
        for begin in range(0, len(same), SELECTED_TOGETHER):
            indices = same[begin : begin + SELECTED_TOGETHER]
            s2s = [statistics[index].s2 for index in indices]
            together = s2s[0] if len(s2s) == 1 else torch.cat(s2s)
            ranked = largest(together, (count,) * len(together)).chunk(len(s2s))
            for index, s2, experts in zip(indices, s2s, ranked, strict=True):
                layers, neurons = s2.shape
                chosen[index] = SlimSpec(
                    intermediate_size=neurons, counts=(count,) * layers, experts=experts
                )
    return [chosen[index] for index in range(len(statistics))]
