"""Token ids in one by one, text out: a completion's text as it is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"

ANCHOR_TOKENS = 4
"""Tokens with text that come before the next one in a window: a character has at most 4 bytes, so
they show whether one is unfinished, and they keep decoders that strip the text's first blank from
the blanks behind them."""

WINDOW_TOKENS = 16
"""A longer window is shortened to its anchor. Each token decodes the window once."""


class TokenDecoder:
    """A tokenizer's decoder, and what it makes of single tokens.

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
        """Tokens for single bytes (sentencepiece's byte fallback). The decoder judges a run of them
        as a whole: if it is not UTF-8, each becomes U+FFFD, the ones that were fine included."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of ``ids``. Ids that the tokenizer does not know have none."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def has_text(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether the decoder looks at this token at all: not at special ones that are left out,
        nor at ids beyond the tokenizer's vocabulary, which a model's padded one may hold."""
        if skip_special_tokens and token_id in self.special_texts:
            return False
        return self._backend.id_to_token(token_id) is not None

    def tail(self, ids: Sequence[int], *, skip_special_tokens: bool) -> list[int]:
        """The end of ``ids``, without tokens that have no text, that decides the text of what is
        appended to it. It does not begin within a run of byte tokens."""
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
    """Token ids in one by one, text out in whole characters.

    The pieces, joined, are what decoding all ids together adds to the text of those before. Where
    a character or a run of byte tokens reaches over the border, that text itself can change. A
    character that is whole only with the completion belongs to it, so the pieces begin at the first
    difference. If the completion spoils a run, so that text before becomes U+FFFD, the pieces have
    those of the completion's own bytes only.

    Text that was given stays given, so what the next token may change is held back: an unfinished
    character (U+FFFD at the end), and a run of byte tokens until another token ends it. Each token
    decodes a short window only, so the cost is linear in the number of tokens.

    Args:
        before: ids that the completion follows, as far as they are known.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, decoder: TokenDecoder, before: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._window = decoder.tail(before, skip_special_tokens=skip_special_tokens)
        self._shown = self._decode()
        """The window's text that was given, or belongs to what was before."""

    def push(self, token_id: int) -> str:
        """Text that this token completes; empty inside a character or a run of byte tokens."""
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
        """What is left at the end: a character cut short shows as U+FFFD."""
        return self._show(self._decode())

    def _decode(self) -> str:
        return self._decoder.decode(self._window, skip_special_tokens=self._skip)

    def _show(self, text: str) -> str:
        """What ``text`` has that was not shown."""
        same = len(self._shown)
        if not text.startswith(self._shown):
            pairs = zip(self._shown, text, strict=False)
            same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(text))
            # A run of byte tokens that was fine until now: a U+FFFD for each of its bytes.
            taken_back = len(self._shown[same:].encode())
            if text.startswith(REPLACEMENT * taken_back, same):
                same += taken_back
        if piece := text[same:]:
            self._shown = text
        return piece

    def _shorten(self, text: str) -> None:
        """Leaves tokens out of the window that the next ones cannot change any more."""
        window = self._decoder.tail(self._window, skip_special_tokens=self._skip)
        shorter = self._decoder.decode(window, skip_special_tokens=self._skip)
        held = text[len(self._shown) :]
        if text.startswith(self._shown) and shorter.endswith(held):
            self._window, self._shown = window, shorter.removesuffix(held)
