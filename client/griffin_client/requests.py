"""From the arguments of a call to its request message.

An option goes to the field of its name: in the request itself, or in the part of it (``Sampling``,
``Stopping``, ``Pruning``, ``SelectionParameters``) that has such a field. So a new option needs no
line here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message as ProtoMessage

from griffin.v1 import generation_pb2 as pb
from griffin_client.errors import invalid_argument
from griffin_client.options import AnalyzeOptions, GenerateOptions, ScoreOptions, check_names
from griffin_client.types import Message

M = TypeVar("M", bound=ProtoMessage)

PARTS: dict[str, type[ProtoMessage]] = {
    "sampling": pb.Sampling,
    "stopping": pb.Stopping,
    "pruning": pb.Pruning,
    "parameters": pb.SelectionParameters,
}
"""Field of a request, or of such a message -> the message that holds some of the options."""

MESSAGES_ALLOWED = (
    "allowed: a list of Message objects, (role, content) pairs or "
    '{"role": ..., "content": ...} dictionaries'
)


def generate_request(
    method: str, prompt: str | None, options: Mapping[str, Any]
) -> pb.GenerateRequest:
    """The request of ``generate``, ``stream_text`` and ``complete``.

    Args:
        method: which of them was called; an unknown option's error names it.
        options: ``GenerateOptions``.

    Raises:
        TypeError: an option is unknown.
        InvalidArgument: the request cannot hold a value.
    """
    check_names(method, options, GenerateOptions)
    fields = dict(options)
    if isinstance(stop := fields.get("stop"), str):
        fields["stop"] = [stop]
    return _request(pb.GenerateRequest, _prompt(prompt, fields))


def score_request(
    context: str | Sequence[int],
    options: Mapping[str, Any],
    *,
    continuation: str | Sequence[int],
) -> pb.ScoreRequest:
    """The request of ``score``; options are ``ScoreOptions``, errors as in ``generate_request``."""
    check_names("score", options, ScoreOptions)
    inputs = {**_text_or_ids("context", context), **_text_or_ids("continuation", continuation)}
    return _request(pb.ScoreRequest, {**options, **inputs})


def score_choices_request(
    context: str | Sequence[int],
    options: Mapping[str, Any],
    *,
    continuations: Sequence[str] | Sequence[Sequence[int]],
) -> pb.ScoreRequest:
    """The request of ``score_choices``; options are ``ScoreOptions``, errors as in
    ``generate_request``."""
    check_names("score_choices", options, ScoreOptions)
    if isinstance(continuations, str):
        raise invalid_argument("continuations", continuations, "allowed: texts or lists of ids")
    choices = [
        _message(
            pb.Continuation,
            f"continuations[{index}].",
            {"text" if isinstance(one, str) else "token_ids": one},
        )
        for index, one in enumerate(continuations)
    ]
    inputs = {**_text_or_ids("context", context), "continuations": choices}
    return _request(pb.ScoreRequest, {**options, **inputs})


def analyze_request(prompt: str | None, options: Mapping[str, Any]) -> pb.AnalyzePromptRequest:
    """The request of ``analyze_prompt``; options are ``AnalyzeOptions``, errors as in
    ``generate_request``."""
    check_names("analyze_prompt", options, AnalyzeOptions)
    return _request(pb.AnalyzePromptRequest, _prompt(prompt, options))


def _prompt(prompt: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the prompt among them and a chat as messages."""
    return {**options, "text": prompt, "messages": _chat(options.get("messages"))}


def _chat(messages: object) -> list[pb.ChatMessage]:
    """The messages of a chat, in any of the forms that ``PromptOptions.messages`` allows."""
    if messages is None:
        return []
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise invalid_argument("messages", messages, MESSAGES_ALLOWED)
    return [
        _message(pb.ChatMessage, f"messages[{index}].", _role_and_content(index, message))
        for index, message in enumerate(messages)
    ]


def _role_and_content(index: int, message: object) -> Mapping[str, Any]:
    """The two fields of a chat's ``index``-th message."""
    match message:
        case Message():
            return {"role": message.role, "content": message.content}
        case {"role": role, "content": content, **rest} if not rest:
            return {"role": role, "content": content}
        case (role, content):
            return {"role": role, "content": content}
    raise invalid_argument(f"messages[{index}]", message, MESSAGES_ALLOWED)


def _text_or_ids(name: str, value: str | Sequence[int]) -> dict[str, Any]:
    """The field of a text, or the field of token ids."""
    return {name if isinstance(value, str) else f"{name}_token_ids": value}


def _request(kind: type[M], options: Mapping[str, Any]) -> M:
    """A request with these options; ``timeout`` is none of the request's.

    Raises:
        InvalidArgument: the request cannot hold a value.
    """
    fields = {name: value for name, value in options.items() if name != "timeout"}
    message = _filled(kind, "", fields) or kind()
    assert not fields, f"{kind.DESCRIPTOR.name} has no field for {', '.join(fields)}"
    return message


def _filled(kind: type[M], path: str, options: dict[str, Any]) -> M | None:
    """A message with the options that it or its parts have fields for; they are removed from
    ``options``. None if there are none."""
    names = kind.DESCRIPTOR.fields_by_name
    values = {name: options.pop(name) for name in list(options) if name in names}
    for part in PARTS.keys() & names.keys():
        values[part] = _filled(PARTS[part], f"{path}{part}.", options)
    return _message(kind, path, values) if any(v is not None for v in values.values()) else None


def _message(kind: type[M], path: str, values: Mapping[str, Any]) -> M:
    """A message with these fields; None leaves a field unset.

    Args:
        path: where the message is in the request; errors name it.

    Raises:
        InvalidArgument: a value has the wrong type for its field, or is outside the type's range.
            Whether the server allows what the field can hold, only the server knows.
    """
    message = kind()
    for name, value in values.items():
        field = kind.DESCRIPTOR.fields_by_name[name]
        try:
            message.MergeFrom(kind(**{name: _field_value(field, f"{path}{name}", value)}))
        except (TypeError, ValueError, AttributeError) as error:
            raise invalid_argument(f"{path}{name}", value, str(error)) from error
    return message


def _field_value(field: Any, path: str, value: Any) -> Any:
    """The value, or for a field of an enum the number of the value that it names.

    Args:
        field: the field's descriptor.
        path: where the field is in the request.

    Raises:
        InvalidArgument: the enum has no such name.
    """
    if value is None or field.enum_type is None:
        return value
    values = field.enum_type.values_by_number
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    numbers = {v.name.removeprefix(prefix).lower(): n for n, v in values.items() if n}
    if not isinstance(value, str) or value.lower() not in numbers:
        raise invalid_argument(path, value, f"allowed: {', '.join(numbers)}")
    return numbers[value.lower()]
