"""Settings of an evaluation: how the model is pruned and how continuations are scored."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from griffin_core.engine.task import PruningParams
from griffin_core.errors import InvalidRequest
from griffin_core.experts.policies import POLICIES
from griffin_core.spec.choices import (
    CORRECTION_KINDS,
    SCORE_MODES,
    SHARINGS,
    CorrectionKind,
    PolicyName,
    ScoreMode,
    Sharing,
)
from griffin_evals.errors import InvalidSetting


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How requests are answered.

    Args:
        density, policy, sharing, correction, correction_rank: as ``griffin_core.LLM`` takes them.
            By default the paper's: no correction.
        warmup_tokens: likewise, for completions; scores have no warm-up.
        score_mode: "generation" or "classification"; see ``mode`` of ``griffin_core.LLM.score``.
        seed: for policies that draw at random, and for sampled completions.

    Raises:
        InvalidSetting: a value is out of range.
    """

    density: float = 1.0
    policy: PolicyName = "topk"
    correction: CorrectionKind = "none"
    correction_rank: int | None = None
    warmup_tokens: int = 0
    sharing: Sharing = "private"
    score_mode: ScoreMode = "generation"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.density, int | float):
            raise InvalidSetting("density", self.density, "a number in (0, 1]")
        # None would mean the default of the core or the server, so answers would depend on the
        # backend.
        if self.policy is None:
            raise InvalidSetting("policy", None, ", ".join(POLICIES))
        if self.correction is None:
            raise InvalidSetting("correction", None, ", ".join(CORRECTION_KINDS))
        if self.sharing is None:
            raise InvalidSetting("sharing", None, ", ".join(SHARINGS))
        try:
            PruningParams(
                density=self.density,
                policy=self.policy,
                sharing=self.sharing,
                correction=self.correction,
                correction_rank=self.correction_rank,
                warmup_tokens=self.warmup_tokens,
            )
        except InvalidRequest as error:
            name = error.field.removeprefix("pruning.")
            raise InvalidSetting(name, error.given, error.allowed) from error
        if self.score_mode not in SCORE_MODES:
            raise InvalidSetting("score_mode", self.score_mode, ", ".join(SCORE_MODES))
        if not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 64):
            raise InvalidSetting("seed", self.seed, "[0, 2^64)")

    @property
    def draws(self) -> bool:
        """Whether the experts depend on the seed."""
        return self.density < 1 and self.policy in ("sampled", "topk_sampled", "random")

    @property
    def asked_mode(self) -> ScoreMode:
        """The mode to request. At density 1 both modes give the same, so it is "generation", which
        also takes contexts of one token, such as those of rolling windows."""
        return "generation" if self.density == 1 else self.score_mode

    def seed_of(self, *request: Any) -> int:
        """The seed of one request. It depends on the content of the request and not on its
        position, so that a resumed run draws what it would have drawn."""
        return int.from_bytes(_digest([self.seed, *request])[:8], "little")

    def key_of(self, fingerprint: str, kind: str, *request: Any) -> str:
        """Returns the key of the answer to a request in a journal.

        At density 1 policy, sharing and mode make no difference, so one answer serves all.

        Args:
            fingerprint: the model's fingerprint.
            kind: the kind of request.
            request: everything that its answer depends on, seeds included.
        """
        dense = self.density == 1
        pruning: list[Any] | None = None
        if not dense:
            pruning = [self.density, self.policy, self.sharing, self.score_mode]
        if pruning and self.correction != "none":
            pruning += [self.correction, self.correction_rank]
        if pruning and self.warmup_tokens:
            pruning += ["warm-up", self.warmup_tokens]
        return _digest([fingerprint, pruning, kind, *request]).hex()


def _digest(content: list[Any]) -> bytes:
    return hashlib.sha256(json.dumps(content).encode()).digest()
