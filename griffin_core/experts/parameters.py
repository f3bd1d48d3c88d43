"""The parameters by which policies and densities choose experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from griffin_core.errors import InvalidRequest
from griffin_core.spec.choices import PolicyName


@dataclass(frozen=True, kw_only=True)
class SelectionParameters:
    """What a request may say beside density and policy. None leaves a parameter at its default.

    Args:
        topk_share: of topk_sampled, in [0, 1]: the share of the experts that is not drawn but taken
            by rank, rounded up to whole neurons. Default: 0.5.

    Raises:
        InvalidRequest: a value is out of range.
    """

    topk_share: float | None = None

    def __post_init__(self) -> None:
        if self.topk_share is not None and not 0 <= self.topk_share <= 1:
            raise InvalidRequest("pruning.parameters.topk_share", self.topk_share, "[0, 1]")

    def of(self, policy: PolicyName) -> SelectionParameters:
        """Returns the same parameters with the defaults of those that belong to the policy."""
        missing = {
            name: DEFAULTS[name]
            for name, owner in OWNERS.items()
            if owner == policy and getattr(self, name) is None
        }
        return replace(self, **missing)

    def check(self, policy: PolicyName) -> None:
        """Raises InvalidRequest if a parameter of another policy is set."""
        for name, owner in OWNERS.items():
            value = getattr(self, name)
            if value is not None and policy != owner:
                field = f"pruning.parameters.{name}"
                raise InvalidRequest(field, f"{value} with policy {policy}", f"policy {owner}")


OWNERS: dict[str, PolicyName] = {"topk_share": "topk_sampled"}
"""Parameter of one policy only -> this policy."""

DEFAULTS = {"topk_share": 0.5}

NO_PARAMETERS = SelectionParameters()
"""All at their defaults."""
