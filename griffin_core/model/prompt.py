"""What callers give as a prompt, as token ids: at least one, and no more than the context takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from griffin_core.errors import InvalidRequest
from griffin_core.model.tokenizer import Tokenizer

PromptKind = Literal["text", "token_ids", "messages"]
"""What a prompt is given as; errors name it so."""


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


def _some(name: str, ids: list[int]) -> list[int]:
    if not ids:
        raise InvalidRequest(name, "a prompt of no tokens", "at least one token")
    return ids
