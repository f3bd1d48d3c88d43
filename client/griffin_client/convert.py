"""The client's dataclasses to messages and back. The one home of both."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache
from typing import Any, TypeVar, cast

from google.protobuf.message import Message as ProtoMessage

from griffin.v1 import generation_pb2 as pb
from griffin_client import types
from griffin_client.errors import invalid_argument

T = TypeVar("T")
M = TypeVar("M", bound=ProtoMessage)


def generate_request(
    prompt: str | None,
    *,
    messages: Iterable[types.Message | tuple[str, str]] | None,
    token_ids: Sequence[int] | None,
    density: float | None,
    policy: types.Policy | None,
    sharing: types.Sharing | None,
    sampling: types.Sampling,
    stopping: types.Stopping,
    top_logprobs: int | None,
    session_id: str | None,
    keep_session: bool,
    request_id: str | None,
    continue_final_message: bool,
    chat_template_kwargs: Mapping[str, Any] | None,
    add_special_tokens: bool | None,
) -> pb.GenerateRequest:
    return _message(
        pb.GenerateRequest,
        text=prompt,
        token_ids=token_ids,
        messages=_chat(messages),
        sampling=_message(pb.Sampling, "sampling.", **asdict(sampling)),
        stopping=_message(pb.Stopping, "stopping.", **asdict(stopping)),
        pruning=_pruning(density, policy, sharing),
        top_logprobs=top_logprobs,
        session_id=session_id,
        keep_session=keep_session,
        request_id=request_id,
        continue_final_message=continue_final_message,
        chat_template_kwargs=chat_template_kwargs,
        add_special_tokens=add_special_tokens,
    )


def score_request(
    context: str | Sequence[int],
    *,
    continuation: str | Sequence[int] | None = None,
    continuations: Sequence[str] | Sequence[Sequence[int]] | None = None,
    mode: types.ScoreMode | None,
    density: float | None,
    policy: types.Policy | None,
    sharing: types.Sharing | None,
    seed: int | None,
    request_id: str | None,
    add_special_tokens: bool | None,
) -> pb.ScoreRequest:
    inputs: dict[str, Any] = {
        name if isinstance(value, str) else f"{name}_token_ids": value
        for name, value in (("context", context), ("continuation", continuation))
        if value is not None
    }
    if isinstance(continuations, str):
        raise invalid_argument("continuations", continuations, "allowed: texts or lists of ids")
    choices = [
        _message(
            pb.Continuation,
            f"continuations[{index}].",
            **{"text" if isinstance(one, str) else "token_ids": one},
        )
        for index, one in enumerate(continuations or ())
    ]
    return _message(
        pb.ScoreRequest,
        **inputs,
        continuations=choices,
        mode=_number("mode", mode, pb.ScoreMode, "SCORE_MODE_"),
        pruning=_pruning(density, policy, sharing),
        seed=seed,
        request_id=request_id,
        add_special_tokens=add_special_tokens,
    )


def analyze_request(
    prompt: str | None,
    *,
    messages: Iterable[types.Message | tuple[str, str]] | None,
    token_ids: Sequence[int] | None,
    density: float | None,
    policy: types.Policy | None,
    seed: int | None,
    activation_layers: Sequence[int],
    request_id: str | None,
    continue_final_message: bool,
    chat_template_kwargs: Mapping[str, Any] | None,
    add_special_tokens: bool | None,
) -> pb.AnalyzePromptRequest:
    return _message(
        pb.AnalyzePromptRequest,
        text=prompt,
        token_ids=token_ids,
        messages=_chat(messages),
        pruning=_pruning(density, policy, None),
        seed=seed,
        activation_layers=activation_layers,
        request_id=request_id,
        continue_final_message=continue_final_message,
        chat_template_kwargs=chat_template_kwargs,
        add_special_tokens=add_special_tokens,
    )


def analysis(responses: Iterable[pb.AnalyzePromptResponse]) -> types.Analysis:
    """Gathers the messages of one stream."""
    started = pb.AnalyzePromptResponse.Started()
    layers: list[types.LayerAnalysis] = []
    activations: dict[int, array[float]] = {}
    for response in responses:
        match response.WhichOneof("event"):
            case "started":
                started = response.started
            case "activations":
                values = activations.setdefault(response.activations.layer, array("f"))
                values.extend(_unpack("f", response.activations.values))
            case "layer":
                layers.append(
                    types.LayerAnalysis(
                        s=_unpack("f", response.layer.s),
                        experts=_unpack("i", response.layer.experts),
                        norm_mass=response.layer.norm_mass,
                    )
                )
    return _fill(
        types.Analysis,
        started,
        token_ids=tuple(started.token_ids),
        texts=tuple(started.texts),
        layers=tuple(layers),
        activations=activations,
    )


def _unpack(code: str, data: bytes) -> array[Any]:
    """Little-endian numbers of four bytes."""
    numbers: array[Any] = array(code, data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _chat(messages: Iterable[types.Message | tuple[str, str]] | None) -> list[pb.ChatMessage]:
    pairs = [(m.role, m.content) if isinstance(m, types.Message) else m for m in messages or ()]
    return [
        _message(pb.ChatMessage, f"messages[{index}].", role=role, content=content)
        for index, (role, content) in enumerate(pairs)
    ]


def _pruning(
    density: float | None, policy: types.Policy | None, sharing: types.Sharing | None
) -> pb.Pruning:
    return _message(
        pb.Pruning,
        "pruning.",
        density=density,
        policy=_number("pruning.policy", policy, pb.SelectionPolicy, "SELECTION_POLICY_"),
        sharing=_number("pruning.sharing", sharing, pb.ExpertSharing, "EXPERT_SHARING_"),
    )


def _number(field: str, name: str | None, enum: Any, prefix: str) -> int | None:
    """A name's number.

    Raises:
        InvalidArgument: no such name.
    """
    if name is None:
        return None
    numbers = {_name(enum, number, prefix): number for number in enum.values() if number}
    number = numbers.get(name.lower())
    if number is None:
        raise invalid_argument(field, name, f"allowed: {', '.join(numbers)}")
    return int(number)


def _message(kind: type[M], path: str = "", **values: Any) -> M:
    """A message with these fields; None leaves a field unset.

    Raises:
        InvalidArgument: a value that the field's type cannot hold. Whether the server allows what
            it can hold is the server's to say.
    """
    message = kind()
    for name, value in values.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError, AttributeError) as error:
            raise invalid_argument(f"{path}{name}", value, str(error)) from error
    return message


def event(response: pb.GenerateResponse) -> types.Event:
    kind = response.WhichOneof("event")
    if kind == "started":
        return _fill(types.Started, response.started, pruning=figures(response.started.pruning))
    if kind == "tokens":
        tokens = response.tokens
        return types.Tokens(
            ids=tuple(tokens.ids),
            text=tokens.text,
            logprobs=tuple(_token_logprob(item) for item in tokens.logprobs),
        )
    finished = response.finished
    return _fill(
        types.Finished,
        finished,
        reason=_name(pb.FinishReason, finished.reason, "FINISH_REASON_"),
        usage=_fill(types.Usage, finished.usage),
        timings=_fill(types.Timings, finished.timings),
        pruning=figures(finished.pruning),
    )


def completion(events: Iterable[types.Event]) -> types.Completion:
    """Gathers the events of one stream."""
    started: types.Started | None = None
    finished: types.Finished | None = None
    tokens: list[types.Tokens] = []
    for item in events:
        match item:
            case types.Started():
                started = item
            case types.Tokens():
                tokens.append(item)
            case types.Finished():
                finished = item
    assert started is not None and finished is not None, "a stream without error has both"
    return types.Completion(
        text="".join(item.text for item in tokens),
        token_ids=tuple(token for item in tokens for token in item.ids),
        logprobs=tuple(logprob for item in tokens for logprob in item.logprobs),
        started=started,
        finished=finished,
    )


def score(response: pb.ScoreResponse) -> types.Score:
    tokens = tuple(_fill(types.TokenScore, item) for item in response.tokens)
    return _fill(types.Score, response, tokens=tokens, pruning=figures(response.pruning))


def scores(response: pb.ScoreResponse) -> tuple[types.Score, ...]:
    """One for each of the request's ``continuations``."""
    pruning = figures(response.pruning)
    return tuple(
        _fill(
            types.Score,
            one,
            tokens=tuple(_fill(types.TokenScore, item) for item in one.tokens),
            context_tokens=response.context_tokens,
            pruning=pruning,
            request_id=response.request_id,
        )
        for one in response.continuations
    )


def model_info(response: pb.GetModelInfoResponse) -> types.ModelInfo:
    policy = _name(pb.SelectionPolicy, response.default_policy, "SELECTION_POLICY_")
    sharing = _name(pb.ExpertSharing, response.default_sharing, "EXPERT_SHARING_")
    return _fill(
        types.ModelInfo,
        response,
        default_policy=policy,
        default_sharing=sharing,
        default_sampling=_sampling(response.default_sampling),
    )


def _sampling(message: pb.Sampling) -> types.Sampling:
    """The fields that are set; None for the others."""
    set_fields = {field.name: value for field, value in message.ListFields()}
    return types.Sampling(**set_fields)


def session(message: pb.Session) -> types.Session:
    return _fill(
        types.Session,
        message,
        state=_name(pb.SessionState, message.state, "SESSION_STATE_"),
        pruning=figures(message.pruning),
    )


def figures(message: pb.PruningFigures) -> types.PruningFigures:
    return _fill(
        types.PruningFigures,
        message,
        policy=_name(pb.SelectionPolicy, message.policy, "SELECTION_POLICY_"),
        norm_mass=tuple(message.norm_mass),
    )


def _token_logprob(message: pb.TokenLogprob) -> types.TokenLogprob:
    top = tuple(_fill(types.TopLogprob, item) for item in message.top)
    return types.TokenLogprob(logprob=message.logprob, top=top)


def _fill(kind: type[T], message: ProtoMessage, **given: Any) -> T:
    """A dataclass whose fields are the message's, but for those given."""
    names = [name for name in _field_names(cast("type", kind)) if name not in given]
    return kind(**{name: getattr(message, name) for name in names}, **given)


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(cast("Any", kind)))


def _name(enum: Any, value: int, prefix: str) -> Any:
    return enum.Name(value).removeprefix(prefix).lower()
