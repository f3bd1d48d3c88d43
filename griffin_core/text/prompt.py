"""Converts prompts of callers to token ids: at least one, and at most as many as the context
holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, cast

from griffin_core.errors import InvalidRequest
from griffin_core.text.tokenizer import Tokenizer

PromptKind = Literal["text", "token_ids", "messages"]
"""The kind of a prompt, by the name that errors use."""

Message = Mapping[str, str] | tuple[str, str]
"""``{"role": ..., "content": ...}``, or a pair of the two."""

Prompt = str | Sequence[Message] | Sequence[int]
"""A text, a chat, or token ids."""


def check_options(
    kind: PromptKind,
    *,
    add_special_tokens: bool | None,
    continue_final_message: bool,
    chat_template_kwargs: object | None,
) -> None:
    """Checks that options for text prompts are only set with a text, and options for chats only
    with a chat.

    Args:
        add_special_tokens, chat_template_kwargs: None if they are not set.

    Raises:
        InvalidRequest: naming the option.
    """
    if add_special_tokens is not None and kind != "text":
        raise InvalidRequest("add_special_tokens", f"set with {kind}", "with text")
    if kind != "messages":
        if continue_final_message:
            raise InvalidRequest("continue_final_message", f"true with {kind}", "with messages")
        if chat_template_kwargs is not None:
            raise InvalidRequest("chat_template_kwargs", f"set with {kind}", "with messages")


def text_ids(
    text: str, tokenizer: Tokenizer, *, special_tokens: bool = True, most: int
) -> list[int]:
    """Tokenizes a text.

    Args:
        special_tokens: whether the tokenizer adds its special tokens, such as a BOS.
        most: the most tokens that the context holds. A longer text is refused before it is
            tokenized completely.

    Raises:
        InvalidRequest: the text is empty or too long.
    """
    if not text:
        raise InvalidRequest("text", "an empty prompt", "at least one token")
    return _some("text", tokenizer.encode(text, special_tokens=special_tokens, most=most))


def chat_ids(
    messages: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    *,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    most: int,
) -> list[int]:
    """Tokenizes a chat as a prompt for the model's answer.

    Args:
        messages: (role, content) pairs, at least one.
        continue_final_message: whether the model continues the last message instead.
        chat_template_kwargs: further variables of the chat template.
        most: see ``text_ids``.

    Raises:
        InvalidRequest: the chat cannot be rendered, or is empty or too long.
    """
    if len(messages) > most:
        raise InvalidRequest(
            "messages", f"{len(messages)} messages", f"at most {most}, the context length"
        )
    for index, (role, _) in enumerate(messages):
        if not role:
            raise InvalidRequest(f"messages[{index}].role", "''", "not empty")
    ids = tokenizer.encode_chat(
        messages,
        continue_final_message=continue_final_message,
        variables=chat_template_kwargs,
        most=most,
    )
    return _some("messages", ids)


def given_ids(name: str, ids: Sequence[int], *, most: int) -> list[int]:
    """Checks the number of token ids that the caller gives. It does not check that the model has
    them.

    Args:
        name: the name of the field, for errors.
        most: see ``text_ids``.

    Raises:
        InvalidRequest: there are none, or too many.
    """
    if len(ids) > most:
        raise InvalidRequest(name, f"{len(ids)} tokens", f"at most {most}, the context length")
    return _some(name, list(ids))


def list_prompts(prompts: object) -> list[Any]:
    """Returns the prompts as a list; a single prompt may be given without a list around it.

    Raises:
        InvalidRequest: the value is neither a prompt nor a list of prompts.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable):
        raise InvalidRequest(
            "prompts", prompts, "texts, chats (lists of messages) or token ids, one or a list"
        )
    listed = list(prompts)
    return [listed] if listed and (_is_id(listed[0]) or _is_message(listed[0])) else listed


def _is_id(item: object) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def are_ids(given: object) -> bool:
    """Returns whether a value is a list of token ids, judged by types alone."""
    return isinstance(given, Sequence) and all(_is_id(item) for item in given)


def _is_message(item: object) -> bool:
    pair = isinstance(item, tuple) and len(item) == 2 and all(isinstance(p, str) for p in item)
    return pair or isinstance(item, Mapping)


def is_chat(prompt: object) -> bool:
    """Returns whether a value is a list of messages; ``prompt_ids`` checks their contents."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(_is_message(item) for item in prompt)
    )


def prompt_ids(
    prompt: object,
    tokenizer: Tokenizer,
    *,
    add_special_tokens: bool | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    most: int,
) -> tuple[PromptKind, list[int]]:
    """Returns the kind of a prompt, and its token ids.

    Args:
        prompt: a ``Prompt``.
        add_special_tokens: None for True.
        most: see ``text_ids``.

    Raises:
        InvalidRequest: the prompt or one of its options is invalid.
    """
    kind: PromptKind
    if isinstance(prompt, str):
        kind = "text"
    elif is_chat(prompt):
        kind = "messages"
    elif are_ids(prompt):
        kind = "token_ids"
    else:
        raise InvalidRequest("prompt", prompt, "a text, a chat, or token ids")
    check_options(
        kind,
        add_special_tokens=add_special_tokens,
        continue_final_message=continue_final_message,
        chat_template_kwargs=chat_template_kwargs,
    )
    if kind == "text":
        special_tokens = add_special_tokens is not False
        ids = text_ids(cast(str, prompt), tokenizer, special_tokens=special_tokens, most=most)
    elif kind == "token_ids":
        ids = given_ids(kind, [int(token) for token in cast(Sequence[int], prompt)], most=most)
    else:
        messages = enumerate(cast(Sequence[object], prompt))
        ids = chat_ids(
            [_message_of(index, message) for index, message in messages],
            tokenizer,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            most=most,
        )
    return kind, ids


def continuations_ids(
    context: str,
    continuations: Sequence[str],
    tokenizer: Tokenizer,
    *,
    names: Sequence[str],
    special_tokens: bool = True,
    most: int,
) -> tuple[list[int], list[list[int]]]:
    """Tokenizes a context and each of the continuations after it; see ``Tokenizer.encode_pair``.

    Args:
        names: the name of each continuation's field, for errors.
        special_tokens, most: see ``text_ids``.

    Raises:
        InvalidRequest: a text is too long; or a continuation shares a token with the context, so
            that the context would not be the same for all continuations.
    """
    prompts, rests = [], []
    for name, continuation in zip(names, continuations, strict=True):
        try:
            prompt, rest = tokenizer.encode_pair(
                context, continuation, special_tokens=special_tokens, most=most
            )
        except InvalidRequest as error:
            field = name if error.field == "continuation" else error.field
            raise InvalidRequest(field, error.given, error.allowed) from error
        prompts.append(prompt)
        rests.append(rest)
    usual = max(prompts, key=len)  # a shared token shortens the context
    for name, prompt, continuation in zip(names, prompts, continuations, strict=True):
        if prompt != usual:
            raise InvalidRequest(
                name,
                f"{continuation!r}, whose first token begins in the context",
                "texts that share no token with the context; score it alone",
            )
    return usual, rests


def _message_of(index: int, given: object) -> tuple[str, str]:
    """Returns role and content of the message with index ``index`` of a chat."""
    if isinstance(given, Mapping):
        if given.keys() != {"role", "content"}:
            names = ", ".join(map(str, given)) or "nothing"
            raise InvalidRequest(f"messages[{index}]", names, "role and content")
        given = (given["role"], given["content"])
    role, content = cast(tuple[object, object], given)
    for name, value in (("role", role), ("content", content)):
        if not isinstance(value, str):
            raise InvalidRequest(f"messages[{index}].{name}", value, "a string")
    return cast(tuple[str, str], (role, content))


def _some(name: str, ids: list[int]) -> list[int]:
    if not ids:
        raise InvalidRequest(name, "a prompt of no tokens", "at least one token")
    return ids
