"""What the client takes and gives, as plain dataclasses. Ranges and defaults: generation.proto."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Policy = Literal["topk", "sampled", "topk_sampled", "magnitude", "random"]
Sharing = Literal["private", "shared", "auto"]
ScoreMode = Literal["generation", "classification"]
FinishReason = Literal["eos", "stop_sequence", "max_tokens", "context_length"]
SessionState = Literal["queued", "prefill", "decode", "idle"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; None takes the server's default.

    That is greedy, the most likely token each time, unless the server was started with
    ``--sampling-defaults model`` and the model's generation_config.json sets the field.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """When to stop; None takes the server's default, which is 256 for max_tokens."""

    max_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int | None = None
    include_stop_string: bool = False
    skip_special_tokens: bool | None = None


@dataclass(frozen=True, kw_only=True)
class PruningFigures:
    """What the pruning did.

    Args:
        experts_per_layer: K of ff_width F neurons.
        norm_mass: for each layer the share of the prompt's activation norm the experts hold; no
            measure of the output's quality.
        slim_view_bytes, kv_cache_bytes: what the session holds on the server.
        mean_density: mean over the turn's tokens so far of the share of the FF neurons they ran on;
            0 before the first. The first comes of the dense pass over the prompt and counts as 1.
        dense_tokens: how many of them ran on all neurons, the first included.
    """

    density: float
    policy: Policy
    experts_per_layer: int
    ff_width: int
    mean_norm_mass: float
    norm_mass: tuple[float, ...]
    slim_view_bytes: int
    kv_cache_bytes: int
    mean_density: float
    dense_tokens: int


@dataclass(frozen=True, kw_only=True)
class Started:
    """The prompt is read, the experts are chosen."""

    session_id: str
    request_id: str
    prompt_tokens: int
    prefill_s: float
    pruning: PruningFigures


@dataclass(frozen=True, kw_only=True)
class TopLogprob:
    """One of the most likely tokens at a place."""

    id: int
    logprob: float
    text: str


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a generated token, and the most likely ones there."""

    logprob: float
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens as they are made. ``text`` holds whole characters and may lag behind ``ids``."""

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a call, and of its session in all."""

    prompt_tokens: int
    generated_tokens: int
    context_tokens: int


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds, measured on the server."""

    queue_s: float
    prefill_s: float
    selection_s: float
    slim_build_s: float
    first_token_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The completion is over.

    Args:
        stop: the stop string that matched, if one did.
    """

    reason: FinishReason
    stop: str
    usage: Usage
    timings: Timings
    pruning: PruningFigures
    session_kept: bool

    @property
    def tokens_per_second(self) -> float:
        """Of decode alone; 0 for a single token."""
        intervals = self.usage.generated_tokens - 1
        return intervals / self.timings.decode_s if self.timings.decode_s > 0 else 0.0


Event = Started | Tokens | Finished


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole completion."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    started: Started
    finished: Finished


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """One token of a scored continuation."""

    id: int
    logprob: float
    greedy: bool


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probability of a continuation; ``greedy`` if each of its tokens is the most likely.

    Args:
        pruning: of ``score_choices`` it is that of the last continuation; in mode "generation" they
            all have the same experts.
    """

    logprob: float
    greedy: bool
    tokens: tuple[TokenScore, ...]
    context_tokens: int
    pruning: PruningFigures
    request_id: str


@dataclass(frozen=True, kw_only=True)
class LayerAnalysis:
    """What a prompt fires in one layer.

    Args:
        s: [F] floats, the statistic.
        experts: [K] ints, ascending.
        norm_mass: the share of s squared that the experts hold.
    """

    s: array[float]
    experts: array[int]
    norm_mass: float


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What a prompt fires. Arrays are those of the standard library; numpy reads them in place.

    Args:
        token_ids, texts: T of each.
        layers: L.
        activations: of the layers asked for, [T * F] floats each, token by token: |z| / ‖z‖.
    """

    request_id: str
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    ff_width: int
    experts_per_layer: int
    layers: tuple[LayerAnalysis, ...]
    activations: Mapping[int, array[float]]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the server holds. Fields as in generation.proto."""

    model: str
    family: str
    fingerprint: str
    layers: int
    width: int
    ff_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_length: int
    dtype: str
    device: str
    role: str
    has_chat_template: bool
    default_density: float
    default_policy: Policy
    default_sharing: Sharing
    max_sessions: int
    version: str
    default_sampling: Sampling = field(default_factory=Sampling)
    batch_invariant: bool = False


@dataclass(frozen=True, kw_only=True)
class Session:
    """A live or kept session."""

    session_id: str
    state: SessionState
    context_tokens: int
    generated_tokens: int
    pruning: PruningFigures
    age_s: float
    idle_s: float
    reserved_bytes: int
