"""The messages that callers send and the values that the client returns, as plain dataclasses.

Dimension letters: T tokens, L layers, F FF neurons of a layer, K experts of a layer. Names that end
in ``_s`` are seconds, names that end in ``_bytes`` are bytes. generation.proto says more on each
field.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from griffin_client.choices import (
    Correction,
    FinishReason,
    Policy,
    SessionState,
    Sharing,
    Speculation,
)
from griffin_client.figures import PruningFigures, SpeculationFigures


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a chat.

    Args:
        role: as the model's chat template knows it: usually "system", "user" or "assistant".
        content: the text.
    """

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """The sampling of requests that do not set it, as the server takes it from its model.

    None where the model has no default; ``griffin_client.options`` says what applies then.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, kw_only=True)
class Started:
    """The first event of a completion: the prompt is read and the experts are chosen.

    Args:
        session_id: name of the session, for a next turn if it is kept.
        request_id: name of the call in the server's logs.
        prompt_tokens: tokens that were prefilled for this call.
        prefill_s: seconds from admission until the experts were there.
        pruning: what is known of the pruning so far.
    """

    session_id: str
    request_id: str
    prompt_tokens: int
    prefill_s: float
    pruning: PruningFigures


@dataclass(frozen=True, kw_only=True)
class TopLogprob:
    """One of the most likely tokens at a position: its id, log-probability and text."""

    id: int
    logprob: float
    text: str


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a generated token, and the most likely tokens at its position."""

    logprob: float
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The next tokens of a completion.

    Args:
        ids: the tokens made since the last event.
        text: the new text. It has whole characters only, so the last of ``ids`` may have no
            text yet.
        logprobs: one for each id if ``top_logprobs`` was set, else empty.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Numbers of tokens.

    Args:
        prompt_tokens: tokens that were prefilled for this call.
        generated_tokens: tokens that this call generated, an end-of-sequence token included.
        context_tokens: tokens that the session holds in all.
    """

    prompt_tokens: int
    generated_tokens: int
    context_tokens: int


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of a call went, in seconds, as the server measured it.

    Args:
        queue_s: from arrival to admission.
        prefill_s: from admission until the prompt was read and its experts were there.
        selection_s: choosing the experts of all layers.
        slim_build_s: from the end of prefill until the session's slim view was built. Tokens do not
            wait for it.
        first_token_s: from arrival to the first token.
        decode_s: from the first token to the last.
    """

    queue_s: float
    prefill_s: float
    selection_s: float
    slim_build_s: float
    first_token_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event of a completion.

    Args:
        reason: why it ended.
        stop: the stop string that matched; empty if none did.
        session_kept: whether the session is kept for a next turn.
        speculation: how many tokens were drafted and accepted.
    """

    reason: FinishReason
    stop: str
    usage: Usage
    timings: Timings
    pruning: PruningFigures
    session_kept: bool
    speculation: SpeculationFigures = field(default_factory=SpeculationFigures)

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second, without the prompt phase; 0 for a single token."""
        intervals = self.usage.generated_tokens - 1
        return intervals / self.timings.decode_s if self.timings.decode_s > 0 else 0.0


Event = Started | Tokens | Finished


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole completion: the text and tokens of its events, and the first and last event."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    started: Started
    finished: Finished


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """One token of a scored continuation.

    Args:
        logprob: natural logarithm of its probability.
        greedy: whether no other token is more likely at its position.
    """

    id: int
    logprob: float
    greedy: bool


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probability of a continuation.

    Args:
        logprob: sum over ``tokens``, natural logarithm.
        greedy: whether each token is the most likely one at its position.
        context_tokens: number of tokens of the context.
        pruning: the figures of the experts. All scores of one ``score_choices`` have those of the
            last continuation; in mode "generation" the experts are the same for all.
    """

    logprob: float
    greedy: bool
    tokens: tuple[TokenScore, ...]
    context_tokens: int
    pruning: PruningFigures
    request_id: str


@dataclass(frozen=True, kw_only=True)
class LayerAnalysis:
    """How strongly a prompt activates the neurons of one layer.

    Args:
        s: [F] floats, the statistic: the l2 norm over tokens of the relative activations.
        experts: [K] ints, the chosen neurons in ascending order.
        norm_mass: the share of the sum of s squared that the experts hold, in [0, 1].
    """

    s: array[float]
    experts: array[int]
    norm_mass: float


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """How strongly a prompt activates the FF neurons, and which experts it chooses.

    Arrays are those of the standard library; numpy reads them without a copy.

    Args:
        token_ids, texts: [T] each; the texts are those of single tokens, for display.
        ff_width: F.
        experts_per_layer: K; the mean over layers, rounded down, where they differ.
        expert_counts: [L], K of each layer; empty for the policies "sensitive" and "topk_budgets",
            whose layers say how many experts they have.
        layers: [L] layers.
        activations: layer -> [T * F] floats, token by token: |z| / ‖z‖, for the layers that
            ``activation_layers`` named.
    """

    request_id: str
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    ff_width: int
    experts_per_layer: int
    expert_counts: tuple[int, ...]
    layers: tuple[LayerAnalysis, ...]
    activations: Mapping[int, array[float]]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The server's model, how it runs it, and its defaults for requests that set nothing."""

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
    default_sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    batch_invariant: bool = False
    default_correction: Correction = "none"
    default_correction_rank: int = 0
    calibration_digest: str = ""
    default_warmup_tokens: int = 0
    default_speculation: Speculation = "off"
    default_agreement_floor: float | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """A live or kept session.

    Args:
        state: "queued" until there is room, "prefill" while its prompt is read, "decode" while it
            generates, "idle" while it is kept for a next turn.
        context_tokens: tokens of all its turns.
        generated_tokens: tokens that all its turns generated.
        age_s: since the session was opened.
        idle_s: since its last token or turn; 0 unless it is idle.
        reserved_bytes: the most memory that it can come to hold.
        owner: the name of the caller that opened it; empty on a server that does
            not ask callers who they are.
    """

    session_id: str
    state: SessionState
    context_tokens: int
    generated_tokens: int
    pruning: PruningFigures
    age_s: float
    idle_s: float
    reserved_bytes: int
    owner: str = ""
