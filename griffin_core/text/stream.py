"""Incremental decoding: turns token ids into text as they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"

ANCHOR_TOKENS = 4
"""The number of tokens with text that a window keeps before the next token. A character has at most
4 bytes, so they show whether one is unfinished; and a decoder that strips the first space of a text
does not strip later ones."""

WINDOW_TOKENS = 16
"""The window size above which it is shortened to its anchor. Each token decodes the window once."""


class TokenDecoder:
    """A tokenizer's decoder, with the properties of single tokens.

    Args:
        backend: a ``tokenizers.Tokenizer``.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder().items()
        self.special_texts: dict[int, str] = {
            i: token.content for i, token in added if token.special
        }
        names = (f"<0x{byte:02X}>" for byte in range(256))
        self.byte_ids = frozenset(
            token_id
            for name in names
            if (token_id := backend.token_to_id(name)) is not None
            and backend.decode([token_id], skip_special_tokens=False) != name
        )
        """The tokens for single bytes (sentencepiece's byte fallback). The decoder treats a run of
        them as a whole: if it is not valid UTF-8, every byte becomes U+FFFD, valid parts
        included."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of ``ids``. Unknown ids have no text."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def has_text(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Returns whether the decoder uses this token: it skips special tokens that are left out,
        and ids beyond the tokenizer's vocabulary, which a model's padded vocabulary may have."""
        if skip_special_tokens and token_id in self.special_texts:
            return False
        return self._backend.id_to_token(token_id) is not None

    def tail(self, ids: Sequence[int], *, skip_special_tokens: bool) -> list[int]:
        """Returns the end of ``ids``, without tokens that have no text, that determines the text of
        tokens appended to it. It does not begin within a run of byte tokens."""
        tail: list[int] = []
        missing = ANCHOR_TOKENS
        for token_id in reversed(ids):
            if self.has_text(token_id, skip_special_tokens=skip_special_tokens):
                tail.append(token_id)
                missing -= token_id not in self.byte_ids
                if not missing:
                    break
        tail.reverse()
        return tail


class TextStream:
    """Takes token ids one by one, and returns text in whole characters.

    The joined pieces are the text that the completion adds when all ids are decoded together. If a
    character or a run of byte tokens crosses the boundary between prompt and completion, the
    prompt's own text can change. A character that only the completion finishes belongs to the
    completion, so the pieces begin at the first difference. If the completion makes a run invalid,
    so that earlier text becomes U+FFFD, the pieces contain U+FFFD only for the completion's own
    bytes.

    Returned text is final, so text that the next token may change is held back: an unfinished
    character (U+FFFD at the end), and a run of byte tokens until another token ends it. Each token
    decodes only a short window, so the cost is linear in the number of tokens.

    Args:
        before: the ids before the completion, as far as they are known.
        skip_special_tokens: whether to leave special tokens out of the text.
    """

    def __init__(
        self, decoder: TokenDecoder, before: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._window = decoder.tail(before, skip_special_tokens=skip_special_tokens)
        self._shown = self._decode()
        """The part of the window's text that was returned already or belongs to the prompt."""

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that it completes; empty inside a character or a run of
        byte tokens."""
        if not self._decoder.has_text(token_id, skip_special_tokens=self._skip):
            return ""
        self._window.append(token_id)
        if token_id in self._decoder.byte_ids:
            return ""
        text = self._decode()
        piece = self._show(text.removesuffix(REPLACEMENT))
        if len(self._window) > WINDOW_TOKENS:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """Returns the remaining text at the end; an unfinished character becomes U+FFFD."""
        return self._show(self._decode())

    def _decode(self) -> str:
        return self._decoder.decode(self._window, skip_special_tokens=self._skip)

    def _show(self, text: str) -> str:
        """Returns the part of ``text`` that was not returned yet."""
        same = len(self._shown)
        if not text.startswith(self._shown):
            pairs = zip(self._shown, text, strict=False)
            same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(text))
            # A run of byte tokens that was valid until now has become a U+FFFD for each byte.
            taken_back = len(self._shown[same:].encode())
            if text.startswith(REPLACEMENT * taken_back, same):
                same += taken_back
        if piece := text[same:]:
            self._shown = text
        return piece

    def _shorten(self, text: str) -> None:
        """Drops tokens from the window whose text later tokens cannot change."""
        window = self._decoder.tail(self._window, skip_special_tokens=self._skip)
        shorter = self._decoder.decode(window, skip_special_tokens=self._skip)
        held = text[len(self._shown) :]
        if text.startswith(self._shown) and shorter.endswith(held):
            self._window, self._shown = window, shorter.removesuffix(held)
