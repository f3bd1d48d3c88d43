"""What ``griffin calibrate`` has measured of a model, beyond its weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from griffin_core.spec.choices import CorrectionKind, PolicyName

PRIOR_TOKENS = 16
"""The number of tokens that the prior counts as, beside those of a prompt. More never helped, and
2048 harmed prompts of 384 tokens (docs/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the experts of a request are chosen and what stands in for the other neurons.

    Args:
        rank: of the residual; 0 for other corrections.
    """

    policy: PolicyName
    correction: CorrectionKind
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The sensitivity of a model's output to each FF neuron, and how strongly each one fires on
    ordinary text.

    Args:
        sensitivity: [L, F] float32, the mean square of the gradient of the log-likelihood of tokens
            that the model itself draws, with respect to the neuron's activation.
        mean_squares: [L, F] float32, the mean of Z_tf² over public text: the prior.
        means: [L, F] float32, the mean of Z_tf over the same text.
        recipe: what lost least on held-out text: the model's default.
        digest: 16 hexadecimal digits: equal for equal values. Servers compare it before a handoff.
    """

    sensitivity: Tensor
    mean_squares: Tensor
    means: Tensor
    recipe: Recipe
    digest: str

    @property
    def importance(self) -> Tensor:
        """[L, F]: how much each neuron matters on ordinary text."""
        return self.mean_squares * self.sensitivity
