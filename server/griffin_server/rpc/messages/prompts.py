"""The prompt of a request, to token ids."""

from __future__ import annotations

import math
from typing import Any

from google.protobuf.struct_pb2 import ListValue, Struct

from griffin.v1 import generation_pb2 as pb
from griffin_core.errors import InvalidRequest
from griffin_core.spec.model import ModelSpec
from griffin_core.text.prompt import PromptKind, chat_ids, check_options, given_ids, text_ids
from griffin_core.text.tokenizer import Tokenizer
from griffin_server.rpc.messages.fields import exactly_one


def input_field(request: pb.GenerateRequest | pb.AnalyzePromptRequest) -> PromptKind:
    """Which of "text", "token_ids" and "messages" a request sets.

    Raises:
        InvalidRequest: it does not set exactly one of them.
    """
    given: dict[PromptKind, bool] = {
        "text": request.HasField("text"),
        "token_ids": bool(request.token_ids),
        "messages": bool(request.messages),
    }
    return exactly_one("input", given)


def prompt_ids(
    field: PromptKind,
    request: pb.GenerateRequest | pb.AnalyzePromptRequest,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    *,
    continues: bool = False,
) -> list[int]:
    """The token ids of a request's prompt, at least one. A prompt longer than the context is
    refused before all of it is tokenized.

    Args:
        field: the field that holds the prompt; see ``input_field``.
        continues: whether the prompt follows the tokens of a kept session.

    Raises:
        InvalidRequest: a field is out of range; the error names the field, value and range.
    """
    most = spec.context_length
    check_options(
        field,
        add_special_tokens=add_special_tokens(request),
        continue_final_message=request.continue_final_message,
        chat_template_kwargs=(
            request.chat_template_kwargs if request.HasField("chat_template_kwargs") else None
        ),
    )
    match field:
        case "text":
            added = add_special_tokens(request)
            special_tokens = not continues if added is None else added
            return text_ids(request.text, tokenizer, special_tokens=special_tokens, most=most)
        case "token_ids":
            return given_ids(field, request.token_ids, most=most)
    if continues:
        raise InvalidRequest(
            "messages", "messages with session_id", "text or token_ids in a later turn"
        )
    if len(request.messages) > most:  # each is at least a token
        raise InvalidRequest(
            "messages", f"{len(request.messages)} messages", f"at most {most}, the context length"
        )
    return chat_ids(
        [(m.role, m.content) for m in request.messages],
        tokenizer,
        continue_final_message=request.continue_final_message,
        chat_template_kwargs=plain_value("chat_template_kwargs", request.chat_template_kwargs),
        most=most,
    )


def add_special_tokens(
    request: pb.GenerateRequest | pb.AnalyzePromptRequest | pb.ScoreRequest,
) -> bool | None:
    """Whether the tokenizer adds its special tokens to the text; None if the field is not set."""
    return request.add_special_tokens if request.HasField("add_special_tokens") else None


def plain_value(name: str, value: Any) -> Any:
    """A ``google.protobuf.Struct``, or a value in one, as Python values. Whole numbers become int.

    Args:
        name: the value's field, for the error.

    Raises:
        InvalidRequest: a number is infinite or NaN, which JSON does not have.
    """
    match value:
        case Struct():
            return {key: plain_value(f"{name}.{key}", item) for key, item in value.fields.items()}
        case ListValue():
            return [plain_value(f"{name}[{i}]", item) for i, item in enumerate(value.values)]
    match value.WhichOneof("kind"):
        case "struct_value" | "list_value" as kind:
            return plain_value(name, getattr(value, kind))
        case "number_value":
            number = value.number_value
            if not math.isfinite(number):
                raise InvalidRequest(name, number, "finite numbers")
            return int(number) if number.is_integer() else number
        case "string_value" | "bool_value" as kind:
            return getattr(value, kind)
    return None
