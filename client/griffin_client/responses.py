"""From a call's response messages to the dataclasses of ``griffin_client.types``."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, cast

from google.protobuf.message import Message as ProtoMessage

from griffin.v1 import generation_pb2 as pb
from griffin_client import types
from griffin_client.figures import PruningFigures, SpeculationFigures

T = TypeVar("T")


def analysis(responses: Iterable[pb.AnalyzePromptResponse]) -> types.Analysis:
    """The analysis that the messages of one ``AnalyzePrompt`` stream make up."""
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
        expert_counts=tuple(started.expert_counts),
        layers=tuple(layers),
        activations=activations,
    )


def _unpack(code: str, data: bytes) -> array[Any]:
    """Numbers of four bytes each, little-endian on the wire.

    Args:
        code: type code of the standard library's ``array``.
    """
    numbers: array[Any] = array(code, data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def event(response: pb.GenerateResponse) -> types.Event:
    """One event of a completion."""
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
        speculation=_fill(SpeculationFigures, finished.speculation),
    )


def completion(events: Iterable[types.Event]) -> types.Completion:
    """The whole completion that the events of one stream make up."""
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
    """The answer to ``score``."""
    tokens = tuple(_fill(types.TokenScore, item) for item in response.tokens)
    return _fill(types.Score, response, tokens=tokens, pruning=figures(response.pruning))


def scores(response: pb.ScoreResponse) -> tuple[types.Score, ...]:
    """The answer to ``score_choices``: one score for each continuation, in order."""
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
    """The answer to ``model_info``."""
    policy = _name(pb.SelectionPolicy, response.default_policy, "SELECTION_POLICY_")
    sharing = _name(pb.ExpertSharing, response.default_sharing, "EXPERT_SHARING_")
    return _fill(
        types.ModelInfo,
        response,
        default_policy=policy,
        default_sharing=sharing,
        default_correction=_correction(response.default_correction),
        default_speculation=_name(
            pb.SpeculationMode,
            response.default_speculation or pb.SPECULATION_MODE_OFF,  # of older servers
            "SPECULATION_MODE_",
        ),
        default_agreement_floor=_optional(response, "default_agreement_floor"),
        default_sampling=_sampling_defaults(response.default_sampling),
    )


def _sampling_defaults(message: pb.Sampling) -> types.SamplingDefaults:
    """The fields that are set; None for the others."""
    names = _field_names(types.SamplingDefaults)
    set_fields = {field.name: value for field, value in message.ListFields()}
    return types.SamplingDefaults(**{name: set_fields.get(name) for name in names})


def session(message: pb.Session) -> types.Session:
    """One session."""
    return _fill(
        types.Session,
        message,
        state=_name(pb.SessionState, message.state, "SESSION_STATE_"),
        pruning=figures(message.pruning),
    )


def figures(message: pb.PruningFigures) -> PruningFigures:
    """The figures on the pruning of a turn."""
    return _fill(
        PruningFigures,
        message,
        policy=_name(pb.SelectionPolicy, message.policy, "SELECTION_POLICY_"),
        correction=_correction(message.correction),
        norm_mass=tuple(message.norm_mass),
        agreement_floor=_optional(message, "agreement_floor"),
        expert_counts=tuple(message.expert_counts),
    )


def _optional(message: ProtoMessage, name: str) -> Any:
    """A field's value; None if it is not set."""
    return getattr(message, name) if message.HasField(name) else None


def _correction(value: int) -> Any:
    """The name of a correction. Servers before Griffin 0.3 send none."""
    return _name(pb.Correction, value or pb.CORRECTION_NONE, "CORRECTION_")


def _token_logprob(message: pb.TokenLogprob) -> types.TokenLogprob:
    top = tuple(_fill(types.TopLogprob, item) for item in message.top)
    return types.TokenLogprob(logprob=message.logprob, top=top)


def _fill(kind: type[T], message: ProtoMessage, **given: Any) -> T:
    """A dataclass with the fields of a message, except for those that are given here."""
    names = [name for name in _field_names(cast("type", kind)) if name not in given]
    return kind(**{name: getattr(message, name) for name in names}, **given)


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(cast("Any", kind)))


def _name(enum: Any, value: int, prefix: str) -> Any:
    """The name of an enum's value as the dataclasses have it: lower case, without the prefix."""
    return enum.Name(value).removeprefix(prefix).lower()
