"""GenerationService's messages to core tasks, and core events to messages. The one home of both."""

from __future__ import annotations

import math
import secrets
import time
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.struct_pb2 import ListValue, Struct

from griffin.v1 import generation_pb2 as pb
from griffin_core.choices import ScoreMode
from griffin_core.decode.events import (
    Finished,
    PruningFigures,
    Scored,
    Started,
    TokensMade,
)
from griffin_core.decode.session import SessionInfo, Sharing, State
from griffin_core.decode.task import (
    GenerateTask,
    PruningParams,
    ScoreTask,
    check_continuations,
)
from griffin_core.errors import InvalidRequest
from griffin_core.experts.selection import PolicyName
from griffin_core.model.generation_config import NO_SAMPLING_DEFAULTS, SamplingDefaults
from griffin_core.model.prompt import (
    PromptKind,
    chat_ids,
    check_options,
    continuations_ids,
    given_ids,
    text_ids,
)
from griffin_core.model.spec import ModelSpec
from griffin_core.model.tokenizer import Tokenizer
from griffin_core.sampling.bad_words import bad_words_ids
from griffin_core.sampling.logprobs import Logprobs
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.stopping import FinishReason, StoppingParams

MOST_SESSIONS_LISTED = 1000
"""Sessions of a page of ListSessions: some 250 KB."""

N = TypeVar("N", bound=str)

_POLICIES: dict[PolicyName, pb.SelectionPolicy.ValueType] = {
    "topk": pb.SELECTION_POLICY_TOPK,
    "sampled": pb.SELECTION_POLICY_SAMPLED,
    "topk_sampled": pb.SELECTION_POLICY_TOPK_SAMPLED,
    "magnitude": pb.SELECTION_POLICY_MAGNITUDE,
    "random": pb.SELECTION_POLICY_RANDOM,
}

_SHARINGS: dict[Sharing, pb.ExpertSharing.ValueType] = {
    "private": pb.EXPERT_SHARING_PRIVATE,
    "shared": pb.EXPERT_SHARING_SHARED,
    "auto": pb.EXPERT_SHARING_AUTO,
}

_SCORE_MODES: dict[ScoreMode, pb.ScoreMode.ValueType] = {
    "generation": pb.SCORE_MODE_GENERATION,
    "classification": pb.SCORE_MODE_CLASSIFICATION,
}

_REASONS = {
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT_LENGTH: pb.FINISH_REASON_CONTEXT_LENGTH,
}

_STATES = {
    State.QUEUED: pb.SESSION_STATE_QUEUED,
    State.PREFILL: pb.SESSION_STATE_PREFILL,
    State.DECODE: pb.SESSION_STATE_DECODE,
    State.IDLE: pb.SESSION_STATE_IDLE,
}


def policy_to_pb(policy: PolicyName) -> pb.SelectionPolicy.ValueType:
    return _POLICIES[policy]


def policy_from_pb(field: str, value: int) -> PolicyName | None:
    """None for UNSPECIFIED.

    Raises:
        InvalidRequest: a number that names no policy.
    """
    return _named(_POLICIES, field, value)


def sharing_to_pb(sharing: Sharing) -> pb.ExpertSharing.ValueType:
    return _SHARINGS[sharing]


def _named(names: Mapping[N, int], field: str, value: int) -> N | None:
    if value == 0:  # UNSPECIFIED
        return None
    for name, number in names.items():
        if number == value:
            return name
    allowed = ", ".join(f"{number} ({name})" for name, number in names.items())
    raise InvalidRequest(field, value, allowed)


def generate_task(
    request: pb.GenerateRequest,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    timeout_s: float | None = None,
    *,
    sampling_defaults: SamplingDefaults = NO_SAMPLING_DEFAULTS,
) -> GenerateTask:
    """Tokenizes and checks a request.

    Args:
        sampling_defaults: values of the sampling fields that the request does not set.
        timeout_s: how long the caller waits; None for ever.

    Raises:
        InvalidRequest: naming field, value and range.
    """
    arrived = time.monotonic()
    field = input_field(request)
    seed = seed_of(request.sampling)
    # What is cheap to check goes before the tokenizer.
    sampling = _sampling(request.sampling, seed, sampling_defaults, tokenizer)
    stopping = _stopping(request.stopping)
    pruning = pruning_params(request.pruning)
    prompt = prompt_ids(field, request, tokenizer, spec, continues=bool(request.session_id))
    task = GenerateTask(
        prompt=tuple(prompt),
        sampling=sampling,
        stopping=stopping,
        pruning=pruning,
        top_logprobs=request.top_logprobs if request.HasField("top_logprobs") else None,
        continues=request.session_id or None,
        keep=request.keep_session,
        arrived=arrived,
        deadline=None if timeout_s is None else arrived + timeout_s,
    )
    task.check(spec, field)
    return task


def score_task(
    request: pb.ScoreRequest,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    timeout_s: float | None = None,
) -> ScoreTask:
    """Tokenizes and checks a request.

    Args:
        timeout_s: how long the caller waits; None for ever.

    Raises:
        InvalidRequest: naming field, value and range.
    """
    arrived = time.monotonic()
    context = _exactly_one(
        "context",
        {
            "context": request.HasField("context"),
            "context_token_ids": bool(request.context_token_ids),
        },
    )
    given = _exactly_one(
        "continuation",
        {
            "continuation": request.HasField("continuation"),
            "continuation_token_ids": bool(request.continuation_token_ids),
            "continuations": bool(request.continuations),
        },
    )
    pruning = pruning_params(request.pruning)
    mode = _named(_SCORE_MODES, "mode", request.mode) or "generation"
    special_tokens = _add_special_tokens(request)
    if special_tokens is not None and context != "context":
        raise InvalidRequest("add_special_tokens", f"set with {context}", "with context")
    prompt, rests, names = _scored_ids(context, given, request, tokenizer, spec)
    task = ScoreTask(
        prompt=tuple(prompt),
        continuations=tuple(map(tuple, rests)),
        mode=mode,
        pruning=pruning,
        seed=seed_of(request),
        arrived=arrived,
        deadline=None if timeout_s is None else arrived + timeout_s,
    )
    task.check(spec, context, names)
    return task


def _scored_ids(
    context: str, given: str, request: pb.ScoreRequest, tokenizer: Tokenizer, spec: ModelSpec
) -> tuple[list[int], list[list[int]], list[str]]:
    """Token ids of a request's context and of its continuations, and the names of these.

    Args:
        context, given: the fields where they are.
    """
    names = [given]
    if given == "continuations":
        check_continuations(len(request.continuations))
        names = [f"continuations[{index}]" for index in range(len(request.continuations))]
        kinds = [
            _exactly_one(
                name,
                {"text": one.HasField("text"), "token_ids": bool(one.token_ids)},
            )
            for name, one in zip(names, request.continuations, strict=True)
        ]
    else:
        kinds = ["token_ids" if given.endswith("_token_ids") else "text"]
    expected = "token_ids" if context.endswith("_token_ids") else "text"
    for name, kind in zip(names, kinds, strict=True):
        if kind != expected:
            shown = f"{name}.{kind}" if given == "continuations" else given
            raise InvalidRequest(
                name if given == "continuations" else "continuation",
                f"{context} with {shown}",
                "both as text or both as token ids",
            )
    most = spec.context_length
    if expected == "text":
        prompt, rests = continuations_ids(
            request.context,
            [one.text for one in request.continuations] or [request.continuation],
            tokenizer,
            names=names,
            special_tokens=_add_special_tokens(request) is not False,
            most=most,
        )
        return prompt, rests, names
    if given == "continuations":
        names = [f"{name}.token_ids" for name in names]
    ids = [one.token_ids for one in request.continuations] or [request.continuation_token_ids]
    prompt = given_ids(context, request.context_token_ids, most=most)
    rests = [given_ids(name, one, most=most) for name, one in zip(names, ids, strict=True)]
    return prompt, rests, names


def input_field(request: pb.GenerateRequest | pb.AnalyzePromptRequest) -> PromptKind:
    """Which of "text", "token_ids" and "messages" a request gives.

    Raises:
        InvalidRequest: not exactly one.
    """
    given: dict[PromptKind, bool] = {
        "text": request.HasField("text"),
        "token_ids": bool(request.token_ids),
        "messages": bool(request.messages),
    }
    return _exactly_one("input", given)


def _exactly_one(name: str, given: Mapping[N, bool]) -> N:
    names = [field for field, is_given in given.items() if is_given]
    if len(names) != 1:
        shown = " and ".join(names) if names else "none"
        allowed = f"exactly one of {', '.join(given)}, not empty"
        raise InvalidRequest(name, shown, allowed)
    return names[0]


def prompt_ids(
    field: PromptKind,
    request: pb.GenerateRequest | pb.AnalyzePromptRequest,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    *,
    continues: bool = False,
) -> list[int]:
    """A request's tokens, at least one. More than the context takes are refused before they are
    all made.

    Args:
        field: where they are, see ``input_field``.
        continues: behind those of a kept session.

    Raises:
        InvalidRequest: naming field, value and range.
    """
    most = spec.context_length
    check_options(
        field,
        add_special_tokens=_add_special_tokens(request),
        continue_final_message=request.continue_final_message,
        chat_template_kwargs=(
            request.chat_template_kwargs if request.HasField("chat_template_kwargs") else None
        ),
    )
    match field:
        case "text":
            added = _add_special_tokens(request)
            special_tokens = not continues if added is None else added
            return text_ids(request.text, tokenizer, special_tokens=special_tokens, most=most)
        case "token_ids":
            return given_ids(field, request.token_ids, most=most)
    if continues:
        raise InvalidRequest(
            "messages", "messages with session_id", "text or token_ids in a later turn"
        )
    return chat_ids(
        [(m.role, m.content) for m in request.messages],
        tokenizer,
        continue_final_message=request.continue_final_message,
        chat_template_kwargs=_plain("chat_template_kwargs", request.chat_template_kwargs),
        most=most,
    )


def _add_special_tokens(
    request: pb.GenerateRequest | pb.AnalyzePromptRequest | pb.ScoreRequest,
) -> bool | None:
    """Whether the tokenizer adds its own special tokens to the text; None if that is not set."""
    return request.add_special_tokens if request.HasField("add_special_tokens") else None


def _plain(name: str, value: Any) -> Any:
    """A ``google.protobuf.Struct``, or a value in one, as Python has it: whole numbers as int.

    Raises:
        InvalidRequest: a number that JSON does not have.
    """
    match value:
        case Struct():
            return {key: _plain(f"{name}.{key}", item) for key, item in value.fields.items()}
        case ListValue():
            return [_plain(f"{name}[{i}]", item) for i, item in enumerate(value.values)]
    match value.WhichOneof("kind"):
        case "struct_value" | "list_value" as kind:
            return _plain(name, getattr(value, kind))
        case "number_value":
            number = value.number_value
            if not math.isfinite(number):
                raise InvalidRequest(name, number, "finite numbers")
            return int(number) if number.is_integer() else number
        case "string_value" | "bool_value" as kind:
            return getattr(value, kind)
    return None


def seed_of(message: pb.Sampling | pb.ScoreRequest | pb.AnalyzePromptRequest) -> int:
    """The seed that is set, or one drawn now."""
    return message.seed if message.HasField("seed") else secrets.randbits(64)


def _set_fields(message: Any, *names: str) -> dict[str, Any]:
    """Values of the optional fields that are set; the core's defaults stand for the others."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _sampling(
    message: pb.Sampling, seed: int, defaults: SamplingDefaults, tokenizer: Tokenizer
) -> SamplingParams:
    given = _set_fields(
        message,
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    )
    return SamplingParams(
        seed=seed,
        logit_bias=dict(message.logit_bias),
        bad_words_ids=bad_words_ids(message.bad_words, tokenizer),
        allowed_token_ids=frozenset(message.allowed_token_ids),
        **{**defaults, **given},
    )


def sampling_defaults_to_pb(defaults: SamplingDefaults) -> pb.Sampling:
    """A message with the fields that are not at their plain defaults."""
    return pb.Sampling(**defaults)  # type: ignore[arg-type]  # each has its field's type


def _stopping(message: pb.Stopping) -> StoppingParams:
    return StoppingParams(
        stop=tuple(message.stop),
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop_string=message.include_stop_string,
        **_set_fields(message, "max_tokens", "min_tokens", "skip_special_tokens"),
    )


def pruning_params(message: pb.Pruning) -> PruningParams:
    return PruningParams(
        policy=policy_from_pb("pruning.policy", message.policy),
        sharing=_named(_SHARINGS, "pruning.sharing", message.sharing),
        **_set_fields(message, "density"),
    )


def started_to_pb(event: Started, request_id: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.Started(
            session_id=event.session_id,
            request_id=request_id,
            prompt_tokens=event.prompt_tokens,
            prefill_s=event.prefill_s,
            pruning=figures_to_pb(event.pruning),
        )
    )


def tokens_to_pb(event: TokensMade, tokenizer: Tokenizer) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        tokens=pb.Tokens(
            ids=event.ids,
            text=event.text,
            logprobs=[_logprobs_to_pb(item, tokenizer) for item in event.logprobs],
        )
    )


def _logprobs_to_pb(item: Logprobs, tokenizer: Tokenizer) -> pb.TokenLogprob:
    top = [
        pb.TopLogprob(id=token, logprob=logprob, text=tokenizer.decode_one(token))
        for token, logprob in item.top
    ]
    return pb.TokenLogprob(logprob=item.chosen, top=top)


def finished_to_pb(event: Finished) -> pb.GenerateResponse:
    timings = event.timings
    return pb.GenerateResponse(
        finished=pb.Finished(
            reason=_REASONS[event.reason],
            stop=event.stop,
            usage=pb.Usage(
                prompt_tokens=event.prompt_tokens,
                generated_tokens=event.generated_tokens,
                context_tokens=event.context_tokens,
            ),
            timings=pb.Timings(
                queue_s=timings.queue_s,
                prefill_s=timings.prefill_s,
                selection_s=timings.selection_s,
                slim_build_s=timings.slim_build_s,
                first_token_s=timings.first_token_s,
                decode_s=timings.decode_s,
            ),
            pruning=figures_to_pb(event.pruning),
            session_kept=event.kept,
        )
    )


def figures_to_pb(figures: PruningFigures) -> pb.PruningFigures:
    return pb.PruningFigures(
        density=figures.density,
        policy=policy_to_pb(figures.policy),
        experts_per_layer=figures.experts_per_layer,
        ff_width=figures.ff_width,
        mean_norm_mass=figures.mean_norm_mass,
        norm_mass=figures.norm_mass,
        slim_view_bytes=figures.slim_view_bytes,
        kv_cache_bytes=figures.kv_cache_bytes,
        mean_density=figures.mean_density,
        dense_tokens=figures.dense_tokens,
    )


def scored_to_pb(
    task: ScoreTask, event: Scored, request_id: str, *, several: bool
) -> pb.ScoreResponse:
    """
    Args:
        several: the request had ``continuations``, so the response has them, too.
    """
    scores = [
        pb.ContinuationScore(
            logprob=sum(scored.logprobs),
            greedy=all(scored.greedy),
            tokens=[
                pb.TokenScore(id=token, logprob=logprob, greedy=greedy)
                for token, logprob, greedy in zip(
                    continuation, scored.logprobs, scored.greedy, strict=True
                )
            ],
        )
        for continuation, scored in zip(task.continuations, event.continuations, strict=True)
    ]
    response = pb.ScoreResponse(
        context_tokens=len(task.prompt),
        pruning=figures_to_pb(event.pruning),
        request_id=request_id,
    )
    if several:
        response.continuations.extend(scores)
    else:
        (score,) = scores
        response.logprob, response.greedy = score.logprob, score.greedy
        response.tokens.extend(score.tokens)
    return response


class PageTokens:
    """Page tokens of ListSessions: opaque to clients, and refused by any other server.

    A token is the end of a page, beside random bytes that this server made at its start.
    """

    def __init__(self) -> None:
        self._server = secrets.token_bytes(8)

    def write(self, last: int | None) -> str:
        """The token for the page after ``last``; empty if there is none."""
        if last is None:
            return ""
        return urlsafe_b64encode(self._server + last.to_bytes(8)).decode()

    def read(self, token: str) -> int:
        """What a page begins after; 0 for the first.

        Raises:
            InvalidRequest: this server has not made the token.
        """
        if not token:
            return 0
        try:
            raw = b64decode(token, altchars=b"-_", validate=True)
        except ValueError:
            raw = b""
        if len(raw) != 16 or raw[:8] != self._server:
            raise InvalidRequest(
                "page_token", token, "empty, or the next_page_token of the page before"
            )
        return int.from_bytes(raw[8:])


def page_size(request: pb.ListSessionsRequest) -> int:
    """Most sessions of the page that is asked for.

    Raises:
        InvalidRequest: it is out of range.
    """
    if not request.HasField("page_size"):
        return MOST_SESSIONS_LISTED
    if not 1 <= request.page_size <= MOST_SESSIONS_LISTED:
        raise InvalidRequest("page_size", request.page_size, f"[1, {MOST_SESSIONS_LISTED}]")
    return request.page_size


def session_to_pb(info: SessionInfo) -> pb.Session:
    return pb.Session(
        session_id=info.session_id,
        state=_STATES[info.state],
        context_tokens=info.context_tokens,
        generated_tokens=info.generated_tokens,
        pruning=figures_to_pb(info.pruning),
        age_s=info.age_s,
        idle_s=info.idle_s,
        reserved_bytes=info.reserved_bytes,
    )
