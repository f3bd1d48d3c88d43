"""The keyword arguments of the client's methods, each written once.

Both clients take them as typed keywords (``**options: Unpack[GenerateOptions]``), so editors and
type checkers know them. The names are those of the OpenAI API and of vLLM where these have one. An
option that is left out, or None, takes the server's default, which ``GriffinClient.model_info``
tells. The server checks ranges and answers with ``InvalidArgument``, which names the field, the
value and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from griffin_client.choices import Correction, Policy, ScoreMode, Sharing, Speculation, Verify
from griffin_client.types import Message


class CallOptions(TypedDict, total=False):
    """What every method takes."""

    timeout: float | None
    """Seconds for the whole call, with its retries, > 0; None for no limit. Default: the
    client's."""


class PromptOptions(TypedDict, total=False):
    """The prompt, where it is no text, and how it becomes tokens."""

    messages: Iterable[Message | Mapping[str, str] | tuple[str, str]] | None
    """A chat instead of a text: ``Message`` objects, (role, content) pairs or
    ``{"role": ..., "content": ...}`` dictionaries. The server renders it with the model's chat
    template."""
    token_ids: Sequence[int] | None
    """Token ids instead of a text, each in [0, V) for a vocabulary of V tokens."""
    add_special_tokens: bool | None
    """Whether a text gets the tokenizer's own special tokens, such as a BOS. Default: True; False
    in a later turn of a session."""
    continue_final_message: bool
    """Whether the model continues the text of the last message instead of answering it. Default:
    False."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Further variables of the chat template, such as ``{"enable_thinking": False}`` or ``tools``;
    values that JSON can hold."""


class ExpertOptions(TypedDict, total=False):
    """How many FF neurons the model runs on, and how they are chosen."""

    density: float | None
    """Fraction of the FF neurons that generation runs on, in (0, 1]; 1 is the dense model."""
    policy: Policy | None
    """How these neurons, the experts, are chosen: "topk", "sampled", "topk_sampled", "magnitude",
    "random", or, for a calibrated model, "sensitive" or "topk_budgets"."""
    topk_share: float | None
    """With the policy "topk_sampled": the share of the experts that is taken by rank and not drawn,
    in [0, 1]. Default: 0.5."""
    correction: Correction | None
    """What is added to the output of the experts in place of the other neurons: "none", "bias"
    (their mean) or "residual" (a linear map of the FF's input as well)."""
    correction_rank: int | None
    """Rank of a residual, in [1, 256]."""


class SharingOptions(TypedDict, total=False):
    """Whether sessions share experts."""

    sharing: Sharing | None
    """"private" gives the session its own experts, "shared" gives it one set together with other
    sessions, and "auto" takes what costs least at the time, which may be all neurons.
    ``Finished.pruning`` says what the tokens ran on."""


class SeedOptions(TypedDict, total=False):
    """What makes random draws repeatable."""

    seed: int | None
    """Seed of the draws of tokens and of the policies that draw experts, in [0, 2^64). Default:
    drawn at random."""


class RequestOptions(CallOptions, total=False):
    """What every method takes that runs the model."""

    request_id: str | None
    """Name of the call in the server's logs and traces, at most 128 printable ASCII characters.
    Default: drawn by the server."""


class SamplingOptions(SeedOptions, total=False):
    """How tokens are drawn from the logits. Without any of them the server is greedy, unless it
    takes its defaults from the model."""

    temperature: float | None
    """Divides the logits, >= 0; 0 takes the most likely token each time. Default: 0."""
    top_k: int | None
    """Keep the k most likely tokens; 0 keeps all. Default: 0."""
    top_p: float | None
    """Keep the smallest set of tokens whose probability reaches top_p, in (0, 1]. Default: 1."""
    min_p: float | None
    """Keep tokens whose probability is at least min_p times that of the most likely one, in
    [0, 1]. Default: 0."""
    repetition_penalty: float | None
    """Lowers (> 1) or raises (< 1) tokens that are in the prompt or the output, in [0.01, 100].
    Default: 1."""
    presence_penalty: float | None
    """Subtracted from the logit of each token that is in the output, in [-2, 2]. Default: 0."""
    frequency_penalty: float | None
    """Subtracted once for each time a token is in the output, in [-2, 2]. Default: 0."""
    logit_bias: Mapping[int, float] | None
    """Token id -> value in [-100, 100] that is added to its logit; at most 1024 entries."""
    bad_words: Sequence[str] | None
    """Texts whose tokens are never completed, at most 64 texts of 1 to 256 characters."""
    allowed_token_ids: Sequence[int] | None
    """Draw only these tokens, at most 1024 ids. Default: all tokens."""


class StoppingOptions(TypedDict, total=False):
    """When a completion ends, besides the model's own end-of-sequence tokens."""

    max_tokens: int | None
    """Generate at most this many tokens, >= 1. Default: 256."""
    stop: str | Sequence[str] | None
    """End before this text or one of these texts; at most 16 of 1 to 256 characters."""
    stop_token_ids: Sequence[int] | None
    """End at one of these tokens, at most 64 ids."""
    ignore_eos: bool
    """Whether to continue after the model's end-of-sequence token. Default: False."""
    min_tokens: int | None
    """Generate at least this many tokens; at most ``max_tokens``. Default: 0."""
    include_stop_string: bool
    """Whether the text ends with the stop string that matched. Default: False."""
    skip_special_tokens: bool | None
    """Whether special tokens are left out of the text. Default: True."""


class SpeculationOptions(TypedDict, total=False):
    """Whether tokens are drafted, and then verified several at a time. A seed gives the same tokens
    with and without, except for rounding."""

    speculation: Speculation | None
    """"lookup" drafts what followed the last tokens where they stood before, in prompt or
    completion; "slim" drafts with the model on the request's experts; "auto" does both while they
    pay; "off" drafts nothing. ``Finished.speculation`` says what was accepted."""
    verify: Verify | None
    """"dense": all neurons verify, so that the completion is that of density 1; "experts": those
    that the density leaves. Default: "dense" with "slim", else "experts"."""
    draft_tokens: int | None
    """The most tokens of a draft, in [1, 16]. Default: 8 with "lookup", 4 with "slim"."""


class GenerateOptions(
    PromptOptions,
    ExpertOptions,
    SharingOptions,
    SpeculationOptions,
    SamplingOptions,
    StoppingOptions,
    RequestOptions,
    total=False,
):
    """The keywords of ``generate``, ``stream_text`` and ``complete``."""

    warmup_tokens: int | None
    """Run on all neurons until so many tokens of prompt and completion have run, which all choose
    the experts, in [0, 2^20]."""
    agreement_floor: float | None
    """In (0, 1), instead of a density: the density follows the agreement with the dense model that
    checks measure, among 1, 0.75 and 0.5."""
    checks: bool | None
    """Check now and then which of the last tokens all neurons would have drawn too, and replace
    what the experts have left in the KV cache. ``Finished.pruning.agreement`` is the share.
    Default: False."""
    top_logprobs: int | None
    """Report the log-probability of each generated token and of this many most likely ones, in
    [0, 20]. Default: no log-probabilities."""
    session_id: str | None
    """Continue this kept session: the server appends the prompt, a text or token ids, to what the
    session holds."""
    keep_session: bool
    """Whether the server keeps the session for a next turn. A turn that fails or is cancelled frees
    it. Default: False."""


class ScoreOptions(ExpertOptions, SharingOptions, SeedOptions, RequestOptions, total=False):
    """The keywords of ``score`` and ``score_choices``."""

    mode: ScoreMode | None
    """"generation": the context chooses the experts, and each token of a continuation runs on them,
    as if it were generated. "classification": every token that is run chooses experts, and only the
    last one runs on them (see ``ScoreMode`` in generation.proto). Default: "generation"."""
    add_special_tokens: bool | None
    """Whether the context, if it is a text, gets the tokenizer's own special tokens. Default:
    True."""


class AnalyzeOptions(PromptOptions, ExpertOptions, SeedOptions, RequestOptions, total=False):
    """The keywords of ``analyze_prompt``."""

    activation_layers: Sequence[int]
    """Return each token's activations in these layers, at most 8. Default: none."""


def check_names(method: str, options: Mapping[str, Any], allowed: type) -> None:
    """Checks the names of keyword arguments.

    Args:
        allowed: the TypedDict of the method's options.

    Raises:
        TypeError: a name is unknown; the message says which names are allowed.
    """
    names = allowed.__annotations__
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(
                f"{method}() got an unexpected keyword argument {name!r}; {hint}"
                f"allowed: {', '.join(sorted(names))}"
            )
