"""What callers give as a prompt, as token ids: at least one, and no more than the context takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, cast

from griffin_core.errors import InvalidRequest
from griffin_core.text.tokenizer import Tokenizer

PromptKind = Literal["text", "token_ids", "messages"]
"""What a prompt is given as; errors name it so."""

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
    """Checks that options of a text come with a text, and those of a chat with a chat.

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
    """Token ids of a text.

    Args:
        special_tokens: whether it gets the tokenizer's own BOS and the like.
        most: tokens that the context takes. A text of more is refused before all are made.

    Raises:
        InvalidRequest: naming what was given and what is allowed.
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
    """Token ids of a chat that the model is to answer.

    Args:
        messages: (role, content) pairs, at least one.
        continue_final_message: the model is to go on with the last message instead.
        chat_template_kwargs: further variables of the chat template.
        most: see ``text_ids``.

    Raises:
        InvalidRequest: naming what was given and what is allowed.
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
    """Token ids that the caller has made itself. Whether the model has them is not looked at.

    Args:
        name: what the caller calls them.
        most: see ``text_ids``.

    Raises:
        InvalidRequest: there are none, or too many.
    """
    if len(ids) > most:
        raise InvalidRequest(name, f"{len(ids)} tokens", f"at most {most}, the context length")
    return _some(name, list(ids))


def list_prompts(prompts: object) -> list[Any]:
    """The prompts: a single one may come without a list around it.

    Raises:
        InvalidRequest: they are neither.
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
    """Whether something is a list of token ids, as far as types say."""
    return isinstance(given, Sequence) and all(_is_id(item) for item in given)


def _is_message(item: object) -> bool:
    pair = isinstance(item, tuple) and len(item) == 2 and all(isinstance(p, str) for p in item)
    return pair or isinstance(item, Mapping)


def is_chat(prompt: object) -> bool:
    """Whether something is a list of messages; what is in them is for ``prompt_ids`` to say."""
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
    """What a prompt is given as, and its token ids.

    Args:
        prompt: a ``Prompt``.
        add_special_tokens: None for True.
        most: see ``text_ids``.

    Raises:
        InvalidRequest: naming what was given and what is allowed.
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
    """Token ids of a context, and of each of the continuations after it; see
    ``Tokenizer.encode_pair``.

    Args:
        names: what the caller calls each continuation.
        special_tokens, most: see ``text_ids``.

    Raises:
        InvalidRequest: a text is too long; or a continuation shares a token with the context, so
            that the context is not the same for all.
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
    usual = max(prompts, key=len)  # what a shared token takes away from the context is missing
    for name, prompt, continuation in zip(names, prompts, continuations, strict=True):
        if prompt != usual:
            raise InvalidRequest(
                name,
                f"{continuation!r}, whose first token begins in the context",
                "texts that share no token with the context; score it alone",
            )
    return usual, rests


def _message_of(index: int, given: object) -> tuple[str, str]:
    """Role and content of a message of a chat, which is its ``index``-th."""
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
