"""Recipes by name: a policy, and what stands in for the neurons that it leaves out.

"topk" is the paper's method; "sensitive+bias" and "topk+residual64" add a correction, whose number
is the rank.
"""

from __future__ import annotations

import re
from typing import cast, get_args

from griffin_core.errors import InvalidRequest
from griffin_core.experts.correction import NO_CORRECTION, CorrectionParams, correction_params
from griffin_core.experts.policies import POLICIES, PolicyName
from griffin_core.spec.choices import CORRECTION_KINDS, CorrectionKind

ALLOWED = f"{', '.join(POLICIES)}, alone or with +bias or +residualRANK"


def parse_recipe(name: str) -> tuple[PolicyName, CorrectionParams]:
    """Returns the policy and the correction of a recipe.

    Raises:
        ValueError: there is none of this name.
    """
    policy, plus, added = name.partition("+")
    if policy not in get_args(PolicyName):
        raise ValueError(f"got {name!r}; allowed: {ALLOWED}")
    if not plus:
        return cast("PolicyName", policy), NO_CORRECTION
    match = re.fullmatch(r"([a-z]+)(\d*)", added)
    if match is None or match[1] not in CORRECTION_KINDS:
        raise ValueError(f"got {name!r}; allowed: {ALLOWED}")
    kind, rank = cast("CorrectionKind", match[1]), int(match[2]) if match[2] else None
    try:
        return cast("PolicyName", policy), correction_params(NO_CORRECTION, kind, rank)
    except InvalidRequest as error:
        raise ValueError(f"got {name!r}: {error}") from error
