"""The sampling parameters of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from griffin_core.errors import InvalidRequest

MAX_LOGIT_BIASES = 1024
MAX_ALLOWED_TOKENS = 1024
LARGEST_SEED = (1 << 64) - 1

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. The defaults are greedy. The ranges are those of generation.proto.

    Args:
        bad_words_ids: token sequences that the completion must not contain; see ``bad_words``.
        allowed_token_ids: only these are drawn; all tokens are if it is empty.

    Raises:
        InvalidRequest: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, allowed: str) -> None:
            value = getattr(self, name)
            if not (holds and math.isfinite(value)):
                raise InvalidRequest(f"sampling.{name}", value, allowed)

        check("temperature", self.temperature >= 0, ">= 0")
        check("top_k", self.top_k >= 0, ">= 0")
        check("top_p", 0 < self.top_p <= 1, "(0, 1]")
        check("min_p", 0 <= self.min_p <= 1, "[0, 1]")
        check("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "[0.01, 100]")
        check("presence_penalty", -2 <= self.presence_penalty <= 2, "[-2, 2]")
        check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "[-2, 2]")
        check("seed", 0 <= self.seed <= LARGEST_SEED, "[0, 2^64)")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidRequest(
                "sampling.logit_bias",
                f"{len(self.logit_bias)} entries",
                f"at most {MAX_LOGIT_BIASES}",
            )
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:  # NaN fails too
                raise InvalidRequest(f"sampling.logit_bias[{token}]", bias, "[-100, 100]")
        if len(self.allowed_token_ids) > MAX_ALLOWED_TOKENS:
            raise InvalidRequest(
                "sampling.allowed_token_ids",
                f"{len(self.allowed_token_ids)} ids",
                f"at most {MAX_ALLOWED_TOKENS}",
            )

    @property
    def penalizes(self) -> bool:
        """Whether a penalty depends on the tokens seen so far."""
        additive = self.presence_penalty != 0 or self.frequency_penalty != 0
        return additive or self.repetition_penalty != 1

    @property
    def plain(self) -> bool:
        """Whether the token is always the argmax of the raw logits among the tokens that are not
        banned."""
        return self.temperature == 0 and not self.penalizes and not self.logit_bias

    @property
    def inverse_temperature(self) -> float:
        """The factor on logits, at most the largest float32; 0 for a greedy request."""
        if self.temperature == 0:
            return 0.0
        if self.temperature <= 1 / _LARGEST_FLOAT32:
            return _LARGEST_FLOAT32
        return 1 / self.temperature
