"""What the engine tells the caller of a task or of a prefill, in the order in which it comes."""

from __future__ import annotations

from dataclasses import dataclass

from griffin_core.forward.events import (
    LayerActivations,
    PrefillEvent,
)
from griffin_core.sampling.logprobs import Logprobs
from griffin_core.sampling.stopping import FinishReason
from griffin_core.spec.choices import CorrectionKind, PolicyName


@dataclass(frozen=True, kw_only=True)
class PruningFigures:
    """What the pruning did to a session.

    Args:
        expert_counts: K of each layer.
        ff_width: F.
        norm_mass: L values, see ``SlimSpec.norm_mass``.
        slim_view_bytes: what it holds beyond the model's own weights.
        kv_cache_bytes: what the session's KV cache holds.
        mean_density: mean density over the turn's tokens so far; 0 before the first token. The
            first token comes from the dense prompt and counts as 1.
        dense_tokens: how many of these tokens ran on all neurons, the first one included.
        checked_tokens: how many of these tokens the dense model was run on once more.
        agreed_tokens: how many of those it draws too, with the same seed and settings.
        agreement_floor: by which the density is set; None if it is fixed.
        correction: what was added to the output of the experts.
        correction_rank: of a residual.
        correction_bytes: what it holds; a part of slim_view_bytes.
    """

    density: float
    policy: PolicyName
    expert_counts: tuple[int, ...]
    ff_width: int
    norm_mass: tuple[float, ...]
    slim_view_bytes: int
    kv_cache_bytes: int
    mean_density: float = 0.0
    dense_tokens: int = 0
    checked_tokens: int = 0
    agreed_tokens: int = 0
    agreement_floor: float | None = None
    correction: CorrectionKind = "none"
    correction_rank: int = 0
    correction_bytes: int = 0

    @property
    def experts_per_layer(self) -> int:
        """K; the mean over layers, rounded down, where they differ."""
        return sum(self.expert_counts) // len(self.expert_counts)

    @property
    def agreement(self) -> float | None:
        """The share of the checked tokens that the dense model draws too; None without checks."""
        return self.agreed_tokens / self.checked_tokens if self.checked_tokens else None

    @property
    def mean_norm_mass(self) -> float:
        """Mean over layers."""
        return sum(self.norm_mass) / len(self.norm_mass) if self.norm_mass else 0.0


@dataclass(frozen=True, kw_only=True)
class SpeculationFigures:
    """The tokens of a turn that were drafted, and those that the model drew too, by source; see
    ``choices.SpeculationMode``."""

    lookup_drafted: int = 0
    lookup_accepted: int = 0
    slim_drafted: int = 0
    slim_accepted: int = 0


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """There is room for the session; its prompt is about to be read.

    Args:
        queue_s: seconds it waited.
    """

    queue_s: float


@dataclass(frozen=True, kw_only=True)
class Started:
    """The prompt is read and the experts are chosen; generation or scoring begins.

    Args:
        prefill_s: seconds since the session was admitted.
        selection_s: seconds of these in which the experts were chosen, here or elsewhere.
    """

    session_id: str
    prompt_tokens: int
    prefill_s: float
    selection_s: float
    pruning: PruningFigures


@dataclass(frozen=True, kw_only=True)
class TokensMade:
    """New tokens. ``text`` lags behind ``ids`` while a character is not whole yet."""

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds, as in generation.proto. All but ``selection_s`` are of one monotonic clock."""

    queue_s: float
    prefill_s: float
    selection_s: float
    slim_build_s: float
    first_token_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The completion is over."""

    reason: FinishReason
    stop: str
    prompt_tokens: int
    generated_tokens: int
    context_tokens: int
    timings: Timings
    pruning: PruningFigures
    speculation: SpeculationFigures
    kept: bool


@dataclass(frozen=True, kw_only=True)
class ContinuationScored:
    """For each token of a continuation: its log-probability, and whether it is the most likely
    one."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Result of a ScoreTask.

    Args:
        continuations: one for each continuation of the task, in order.
        pruning: its experts are those of the last continuation.
    """

    continuations: tuple[ContinuationScored, ...]
    pruning: PruningFigures


@dataclass(frozen=True, kw_only=True)
class Failed:
    """It ended with an error, and holds nothing any more."""

    error: Exception


Event = Admitted | Started | TokensMade | Finished | Scored | Failed


@dataclass(frozen=True, kw_only=True)
class PrefillBegun:
    """The first pass with tokens of this prompt begins.

    Args:
        queue_s: seconds the prompt waited.
    """

    queue_s: float


PrefillStreamEvent = PrefillBegun | PrefillEvent | LayerActivations | Failed
