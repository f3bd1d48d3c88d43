"""What the engine tells a caller about its session, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from griffin_core.experts.selection import PolicyName, Selection
from griffin_core.sampling.logprobs import Logprobs
from griffin_core.sampling.stopping import FinishReason


@dataclass(frozen=True, kw_only=True)
class PruningFigures:
    """What the pruning did to a session.

    Args:
        experts_per_layer: K.
        ff_width: F.
        norm_mass: L values, see ``expert_set.norm_mass``.
        slim_view_bytes: held beyond the model's own weights.
        kv_cache_bytes: held by the session's cache.
        mean_density: mean over the turn's tokens so far of the density they ran at; 0 before the
            first. The first comes of the dense prompt and counts as 1.
        dense_tokens: how many of them ran on all neurons, that first one included.
    """

    density: float
    policy: PolicyName
    experts_per_layer: int
    ff_width: int
    norm_mass: tuple[float, ...]
    slim_view_bytes: int
    kv_cache_bytes: int
    mean_density: float = 0.0
    dense_tokens: int = 0

    @property
    def mean_norm_mass(self) -> float:
        """Mean over layers."""
        return sum(self.norm_mass) / len(self.norm_mass) if self.norm_mass else 0.0


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """There is room.

    Args:
        queue_s: seconds it waited.
        handoff: how the caller is to have the prompt prefilled, handing what comes to
            ``Engine.intake``; None for a later turn, which the engine prefills itself.
    """

    queue_s: float
    handoff: Selection | None


@dataclass(frozen=True, kw_only=True)
class Started:
    """The prompt is read and the experts are chosen; generation or scoring begins.

    Args:
        prefill_s: seconds since it was admitted.
        selection_s: seconds of them that went into choosing, wherever that was.
    """

    session_id: str
    prompt_tokens: int
    prefill_s: float
    selection_s: float
    pruning: PruningFigures


@dataclass(frozen=True, kw_only=True)
class TokensMade:
    """Tokens of one step. ``text`` lags behind ``ids`` where a character is not whole yet."""

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds, all of one monotonic clock but selection_s. As in generation.proto."""

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
    kept: bool


@dataclass(frozen=True, kw_only=True)
class ContinuationScored:
    """For each token of a continuation its log-probability, and whether it is the most likely."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Result of a ScoreTask.

    Args:
        continuations: one for each of the task's, in order.
        pruning: its experts are those of the last continuation.
    """

    continuations: tuple[ContinuationScored, ...]
    pruning: PruningFigures


@dataclass(frozen=True, kw_only=True)
class Failed:
    """It ended with an error; nothing of it is left."""

    error: Exception


Event = Admitted | Started | TokensMade | Finished | Scored | Failed


E_contra = TypeVar("E_contra", contravariant=True)


class Sink(Protocol[E_contra]):
    """Where events go. Called in the engine's thread; must not block.

    A sink that is not ready pauses what feeds it and nothing else.
    """

    def put(self, event: E_contra) -> None: ...

    def ready(self) -> bool: ...
