"""Recipes by name: a policy, and what stands in for the neurons that it leaves out.

"topk" is the paper's method; "sensitive+bias" and "topk+residual64" add a correction, whose number
is the rank, and "topk+warmup48" a warm-up of so many tokens. Imports no torch, so that the help is
shown fast.
"""

from __future__ import annotations

import re
from typing import NamedTuple, cast, get_args

from griffin_core.spec.choices import (
    CORRECTION_KINDS,
    DEFAULT_RANK,
    MAX_RANK,
    MAX_WARMUP,
    CorrectionKind,
    PolicyName,
)

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
ALLOWED = f"{', '.join(POLICIES)}, alone or with +bias or +residualRANK, and with +warmupTOKENS"


class NamedRecipe(NamedTuple):
    """A recipe; the rank is 0 without a residual, and so is the warm-up's number of tokens."""

    policy: PolicyName
    correction: CorrectionKind
    rank: int
    warmup: int = 0


def parse_recipe(name: str) -> NamedRecipe:
    """Returns the recipe of a name.

    Raises:
        ValueError: there is none.
    """
    recipe, warms, tokens = name.partition("+warmup")
    if warms and not (tokens.isdecimal() and 1 <= int(tokens) <= MAX_WARMUP):
        raise ValueError(f"got {name!r}; allowed: a warm-up of 1 to {MAX_WARMUP} tokens")
    policy, plus, added = recipe.partition("+")
    match = re.fullmatch(r"([a-z]+)(\d*)", added) if plus else re.fullmatch("(none)()", "none")
    if policy not in POLICIES or match is None or match[1] not in CORRECTION_KINDS:
        raise ValueError(f"got {name!r}; allowed: {ALLOWED}")
    kind = cast("CorrectionKind", match[1])
    rank = int(match[2] or DEFAULT_RANK) if kind == "residual" else int(match[2] or 0)
    if not (1 <= rank <= MAX_RANK if kind == "residual" else rank == 0):
        raise ValueError(f"got {name!r}; allowed: a rank in [1, {MAX_RANK}] of a residual")
    return NamedRecipe(policy, kind, rank, int(tokens or 0))
