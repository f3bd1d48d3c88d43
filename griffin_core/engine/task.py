"""What a caller may ask of the engine, checked against the model before work is spent on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from uuid import uuid4

from griffin_core.errors import InvalidRequest
from griffin_core.experts.correction import NO_CORRECTION, correction_params
from griffin_core.experts.parameters import NO_PARAMETERS, SelectionParameters
from griffin_core.experts.policies import POLICIES, PolicyName
from griffin_core.experts.selection import Selection
from griffin_core.sampling.logprobs import MAX_TOP_LOGPROBS
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.speculation import SpeculationParams
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.choices import (
    DEFAULT_RANK,
    MAX_WARMUP,
    SCORE_MODES,
    SHARINGS,
    CorrectionKind,
    ScoreMode,
    Sharing,
)
from griffin_core.spec.model import ModelSpec

MAX_CONTINUATIONS = 256
"""Most continuations of one ScoreTask."""

MAX_CONCURRENT_PREFILLS = 4
"""Prefills for other servers that run at once, each with a KV cache that no session's reservation
covers. There may be several, so that a reader that lags delays no other prompt, and so that
several share a pass."""


@dataclass(frozen=True, kw_only=True)
class PruningParams:
    """What a request says about its experts. None leaves a choice to the engine's defaults.

    Args:
        parameters: what a request may say beside these.
        sharing: see ``choices.Sharing``.
        correction: see ``choices.CorrectionKind``.
        correction_rank: of a residual.
        warmup_tokens: see ``Selection``.
        checks: whether dense passes check the tokens that were made; see ``engine.dense_passes``.
        agreement_floor: the density follows what checks measure; see ``engine.density_control``.

    Raises:
        InvalidRequest: density is not in (0, 1], there is no such policy, sharing or correction, a
            parameter is not one of the policy, the warm-up or the floor is out of range, or there
            are both a density and a floor.
    """

    density: float | None = None
    policy: PolicyName | None = None
    parameters: SelectionParameters | None = None
    sharing: Sharing | None = None
    correction: CorrectionKind | None = None
    correction_rank: int | None = None
    warmup_tokens: int | None = None
    checks: bool | None = None
    agreement_floor: float | None = None

    def __post_init__(self) -> None:
        density = self.density
        if density is not None and not (isinstance(density, Real) and 0 < density <= 1):
            raise InvalidRequest("pruning.density", self.density, "(0, 1]")
        floor = self.agreement_floor
        if floor is not None and not (isinstance(floor, Real) and 0 < floor < 1):
            raise InvalidRequest("pruning.agreement_floor", floor, "(0, 1)")
        if floor is not None and density is not None:
            raise InvalidRequest(
                "pruning.density", density, "none beside an agreement_floor, which sets it"
            )
        if self.policy is not None and self.policy not in POLICIES:
            raise InvalidRequest("pruning.policy", self.policy, ", ".join(POLICIES))
        if self.policy is not None and self.parameters is not None:
            self.parameters.check(self.policy)
        if self.sharing is not None and self.sharing not in SHARINGS:
            raise InvalidRequest("pruning.sharing", self.sharing, ", ".join(SHARINGS))
        if self.correction is not None:
            correction_params(NO_CORRECTION, self.correction, self.correction_rank)
        warmup = self.warmup_tokens
        if warmup is not None and not (isinstance(warmup, int) and 0 <= warmup <= MAX_WARMUP):
            raise InvalidRequest("pruning.warmup_tokens", warmup, f"[0, {MAX_WARMUP}]")

    def selection(self, base: Selection, seed: int, default_rank: int = DEFAULT_RANK) -> Selection:
        """The selection to run: what this request sets, and ``base`` for the rest.

        Args:
            default_rank: of a residual where neither says one.

        Raises:
            InvalidRequest: a parameter is not one of the policy, or a rank of the correction.
        """
        policy = self.policy or base.policy
        inherited = base.parameters if policy == base.policy else NO_PARAMETERS
        return Selection(
            density=base.density if self.density is None else self.density,
            policy=policy,
            parameters=self.parameters or inherited,
            correction=correction_params(
                base.correction,
                self.correction,
                self.correction_rank,
                default_rank=default_rank,
            ),
            warmup_tokens=base.warmup_tokens if self.warmup_tokens is None else self.warmup_tokens,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class GenerateTask:
    """Generate from a prompt, or from a kept session and further tokens.

    Args:
        prompt: token ids of this turn, at least one.
        sampling: its seed is also the seed of selection policies that draw.
        top_logprobs: alternatives to report with each token; None for no log-probabilities.
        continues: id of the kept session this is a later turn of.
        keep: keep the session afterwards.
        owner: who asks: whose the session is, and whose a continued one must be. Empty where
            callers are not told apart.
        arrived: when the call came, on ``time.monotonic``.
        deadline: until when the caller waits, on the same clock; None for no limit.
        turn_id: names this turn; also the id of the session it opens, unless it continues one.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)
    pruning: PruningParams = field(default_factory=PruningParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    top_logprobs: int | None = None
    continues: str | None = None
    keep: bool = False
    owner: str = ""
    turn_id: str = field(default_factory=lambda: uuid4().hex)
    arrived: float = field(default_factory=time.monotonic, compare=False)
    deadline: float | None = None

    @property
    def prefilled(self) -> tuple[int, ...]:
        """The tokens that the prefill reads."""
        return self.prompt

    def check(self, spec: ModelSpec, prompt_field: str) -> None:
        """Raises InvalidRequest for whatever does not fit the model.

        Args:
            prompt_field: what the caller calls the prompt: "text", "token_ids" or "messages".
        """
        check_token_ids(prompt_field, self.prompt, spec)
        if len(self.prompt) >= spec.context_length:
            raise InvalidRequest(
                prompt_field,
                f"{len(self.prompt)} tokens",
                f"at most {spec.context_length - 1} tokens, one less than the context length",
            )
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequest("top_logprobs", self.top_logprobs, f"[0, {MAX_TOP_LOGPROBS}]")
        check_token_ids("stopping.stop_token_ids", sorted(self.stopping.stop_token_ids), spec)
        check_token_ids("sampling.logit_bias", sorted(self.sampling.logit_bias), spec)
        allowed = sorted(self.sampling.allowed_token_ids)
        check_token_ids("sampling.allowed_token_ids", allowed, spec)


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """Log-probabilities of continuations, each scored by itself after ``prompt``, the context.

    Args:
        prompt: token ids of the context, at least one; in mode classification at least two.
        continuations: 1 to MAX_CONTINUATIONS, each of at least one token.
        mode: see ``choices.ScoreMode``.
        seed: for selection policies that draw.
        owner: see ``GenerateTask``.
        turn_id: also the id of its session.
        arrived: when the call came, on ``time.monotonic``.
        deadline: until when the caller waits, on the same clock; None for no limit.

    Raises:
        InvalidRequest: there is no such mode, or a warm-up is asked for.
    """

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    mode: ScoreMode = "generation"
    pruning: PruningParams = field(default_factory=PruningParams)
    seed: int = 0
    owner: str = ""
    turn_id: str = field(default_factory=lambda: uuid4().hex)
    arrived: float = field(default_factory=time.monotonic, compare=False)
    deadline: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in SCORE_MODES:
            raise InvalidRequest("mode", self.mode, ", ".join(SCORE_MODES))
        if warmup := self.pruning.warmup_tokens:
            raise InvalidRequest("pruning.warmup_tokens", warmup, "0 in a score")
        if (floor := self.pruning.agreement_floor) is not None:
            raise InvalidRequest("pruning.agreement_floor", floor, "none in a score")
        if self.pruning.checks:
            raise InvalidRequest("pruning.checks", True, "false in a score")

    @property
    def prefilled(self) -> tuple[int, ...]:
        """The tokens of the context that the prefill reads. In classification that is all but the
        last one, with which every continuation begins."""
        return self.prompt if self.mode == "generation" else self.prompt[:-1]

    @property
    def run_tokens(self) -> int:
        """Tokens of the context and of the longest continuation that are run. The last token of a
        continuation is only looked up."""
        return len(self.prompt) + max(map(len, self.continuations)) - 1

    def check(
        self, spec: ModelSpec, context_field: str, continuation_fields: Sequence[str]
    ) -> None:
        """Raises InvalidRequest for whatever does not fit the model.

        Args:
            context_field, continuation_fields: what the caller calls the context and each of the
                continuations.
        """
        check_continuations(len(self.continuations))
        if not self.prompt:
            raise InvalidRequest(
                context_field, "no tokens before those of the continuation", "at least one token"
            )
        if self.mode == "classification" and len(self.prompt) == 1:
            raise InvalidRequest(
                context_field, "one token", "at least two tokens with mode classification"
            )
        check_token_ids(context_field, self.prompt, spec)
        for name, continuation in zip(continuation_fields, self.continuations, strict=True):
            if not continuation:
                raise InvalidRequest(name, "no tokens after the context", "at least one token")
            check_token_ids(name, continuation, spec)
            total = len(self.prompt) + len(continuation)
            if total - 1 > spec.context_length:  # the last is only looked up
                raise InvalidRequest(
                    name,
                    f"{total} tokens with the context",
                    f"at most {spec.context_length + 1}, one more than the context length",
                )


def check_continuations(count: int) -> None:
    """Raises InvalidRequest if one context may not have that many continuations."""
    if not 1 <= count <= MAX_CONTINUATIONS:
        raise InvalidRequest("continuations", f"{count} of them", f"1 to {MAX_CONTINUATIONS}")


def check_token_ids(name: str, ids: Sequence[int], spec: ModelSpec) -> None:
    """Raises InvalidRequest unless every id is in [0, V)."""
    for index, token in enumerate(ids):
        if not 0 <= token < spec.vocab_size:
            raise InvalidRequest(
                f"{name}[{index}]", token, f"[0, {spec.vocab_size}), the vocabulary"
            )


@dataclass(frozen=True, kw_only=True)
class PrefillTask:
    """A prompt to read for a Decode engine, here or elsewhere, or for a caller that studies it.

    Args:
        token_ids: at least one id.
        wants_kv: whether LayerKv events are wanted.
        watch: layers whose activations are wanted.
        max_concurrent: it begins only while at most that many prefills that own their KV cache
            run, this one included.
        owner: whose it is; owners take turns.
    """

    token_ids: tuple[int, ...]
    selection: Selection
    wants_kv: bool = True
    watch: frozenset[int] = frozenset()
    max_concurrent: int = MAX_CONCURRENT_PREFILLS
    owner: str = ""
