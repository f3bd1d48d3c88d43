"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from griffin_core.errors import BadModelFile, InvalidRequest


class Tokenizer:
    """A model's tokenizer and chat template.

    Args:
        tokenizer: a "fast" tokenizer of transformers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer: Any = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer

    @property
    def eos_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, with the tokenizer's own BOS and the like if asked for."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a chat that the model is to answer.

        Args:
            messages: (role, content) pairs.

        Raises:
            InvalidRequest: the model has no chat template, or its template refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "messages", f"{len(messages)} messages", "text or token_ids: no chat template"
            )
        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            roles = ", ".join(role for role, _ in messages)
            raise InvalidRequest(
                "messages", f"roles {roles}", f"the template's: {error}"
            ) from error
        return self.encode(text, special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def decode_one(self, token_id: int) -> str:
        """Text of one token by itself, special tokens shown."""
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text

    def stream(self) -> TextStream:
        """A new incremental decoder."""
        return TextStream(self._backend)


class TextStream:
    """Token ids in one by one, text out in whole characters.

    The text of all calls joined is the text of all ids decoded at once.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._given = 0

    def push(self, token_id: int) -> str:
        """Text that this token completes; empty inside a character."""
        self._ids.append(token_id)
        text = self._stream.step(self._backend, token_id) or ""
        self._given += len(text)
        return text

    def flush(self) -> str:
        """What is left at the end: a character cut short shows as U+FFFD."""
        text: str = self._backend.decode(self._ids, skip_special_tokens=True)[self._given :]
        self._given += len(text)
        return text


def load_tokenizer(where: str) -> Tokenizer:
    """Loads the tokenizer of a directory or hub id.

    Raises:
        BadModelFile: there is none, or it has no fast form.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # each tokenizer class raises its own
        raise BadModelFile(
            f"tokenizer: cannot load it ({type(error).__name__}: {error})"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise BadModelFile(
            f"tokenizer: {type(tokenizer).__name__} has no fast form, which is needed"
        )
    return Tokenizer(tokenizer)
