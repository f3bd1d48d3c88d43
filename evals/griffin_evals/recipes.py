"""Recipes by name: a policy, and what stands in for the neurons that it leaves out.

"topk" is the paper's method; "sensitive+bias" and "topk+residual64" add a correction, whose number
is the rank. Imports no torch, so that the help is shown fast.
"""

from __future__ import annotations

import re
from typing import NamedTuple, cast, get_args

from griffin_core.spec.choices import (
    CORRECTION_KINDS,
    DEFAULT_RANK,
    MAX_RANK,
    CorrectionKind,
    PolicyName,
)

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
ALLOWED = f"{', '.join(POLICIES)}, alone or with +bias or +residualRANK"


class NamedRecipe(NamedTuple):
    """A recipe; the rank is 0 without a residual."""

    policy: PolicyName
    correction: CorrectionKind
    rank: int


def parse_recipe(name: str) -> NamedRecipe:
    """Returns the recipe of a name.

    Raises:
        ValueError: there is none.
    """
    policy, plus, added = name.partition("+")
    match = re.fullmatch(r"([a-z]+)(\d*)", added) if plus else re.fullmatch("(none)()", "none")
    if policy not in POLICIES or match is None or match[1] not in CORRECTION_KINDS:
        raise ValueError(f"got {name!r}; allowed: {ALLOWED}")
    kind = cast("CorrectionKind", match[1])
    rank = int(match[2] or DEFAULT_RANK) if kind == "residual" else int(match[2] or 0)
    if not (1 <= rank <= MAX_RANK if kind == "residual" else rank == 0):
        raise ValueError(f"got {name!r}; allowed: a rank in [1, {MAX_RANK}] of a residual")
    return NamedRecipe(policy, kind, rank)
