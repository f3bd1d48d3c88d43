"""Measures recipes on held-out text, and says which one is best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Generic, TypeVar

import torch

from griffin_core.calibration.forced_text import ForcedText
from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.selection import Selection
from griffin_core.model.decoder import Decoder
from griffin_core.spec.calibration import Recipe
from griffin_core.spec.choices import DEFAULT_RANK

PLAIN = Recipe(policy="topk", correction="none")
"""The paper's method, which others must beat."""

CANDIDATES: tuple[Recipe, ...] = (
    PLAIN,
    Recipe(policy="topk", correction="bias"),
    Recipe(policy="topk", correction="residual", rank=DEFAULT_RANK),
    Recipe(policy="topk_budgets", correction="bias"),
    Recipe(policy="topk_budgets", correction="residual", rank=DEFAULT_RANK),
    Recipe(policy="sensitive", correction="bias"),
    Recipe(policy="sensitive", correction="residual", rank=DEFAULT_RANK),
)

ERRORS_NEEDED = 2.0
"""By how many standard errors of the paired difference a recipe must beat plain topk."""


K = TypeVar("K")


@dataclass(frozen=True, kw_only=True)
class Compared(Generic[K]):
    """A recipe beside plain topk on the same windows.

    Args:
        kl: mean KL(dense || pruned) of a token, in nats.
        change: its change relative to plain topk, such as -0.3 for 30 % less.
        change_error: standard error of ``change``, paired by window.
    """

    recipe: K
    kl: float
    change: float
    change_error: float

    @property
    def beats_plain(self) -> bool:
        return self.change < -ERRORS_NEEDED * self.change_error


@torch.inference_mode()
def divergences(
    decoder: Decoder,
    window: Sequence[int],
    prompt_tokens: int,
    density: float,
    recipes: Sequence[Recipe] = CANDIDATES,
    *,
    skipped: int = 0,
) -> dict[Recipe, float]:
    """Returns the mean KL of the tokens after a prompt, which are given and not drawn, by recipe.

    Args:
        skipped: how many of the first tokens after the prompt do not count.
    """
    text = ForcedText(decoder, window, prompt_tokens)
    dense = text.dense[skipped:]
    found = {}
    for recipe in recipes:
        pruned = text.pruned(
            Selection(
                density=density,
                policy=recipe.policy,
                correction=CorrectionParams(kind=recipe.correction, rank=recipe.rank),
            )
        )[skipped:]
        found[recipe] = float((dense.exp() * (dense - pruned)).sum(dim=1).mean())
    return found


def compare(by_window: Sequence[Mapping[K, float]], plain_recipe: K) -> list[Compared[K]]:
    """Compares recipes over windows.

    Args:
        by_window: the KL of every recipe, for each of at least two windows.
        plain_recipe: what the others are compared with.
    """
    plain = [window[plain_recipe] for window in by_window]
    compared = []
    for recipe in by_window[0]:
        own = [window[recipe] for window in by_window]
        differences = [one - other for one, other in zip(own, plain, strict=True)]
        error = stdev(differences) / len(differences) ** 0.5
        compared.append(
            Compared(
                recipe=recipe,
                kl=mean(own),
                change=mean(differences) / mean(plain),
                change_error=error / mean(plain),
            )
        )
    return compared


def best_of(compared: Sequence[Compared[Recipe]]) -> Recipe:
    """Returns the recipe of the least KL among those that beat plain topk; else plain topk."""
    better = [each for each in compared if each.beats_plain]
    return min(better, key=lambda each: each.kl).recipe if better else PLAIN


Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done and of how much."""
