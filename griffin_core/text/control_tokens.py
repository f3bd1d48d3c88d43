"""Control tokens in what callers write into a chat: they become text.

A chat template puts control tokens around the messages, such as the end of a turn. If a message
itself contains the text of such a token, a tokenizer makes the token of it, and whoever writes the
message could end the turn and write the next one, in another role. So these texts are hidden while
the template is rendered, and the tokens that the tokenizer makes of them are replaced by those of
their letters.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

MARK = "\ue0f7"
"""A character of the private use area. Between two of them a random word and a number stand for a
hidden text. Nobody who writes a message knows the word."""


class ControlTokens:
    """Hides the control tokens of a tokenizer in a chat.

    Args:
        backend: the tokenizer.
        texts: the texts of its control tokens, by their ids.
    """

    def __init__(self, backend: Any, texts: Mapping[int, str]) -> None:
        self._backend = backend
        self._ids = texts.keys()
        longest_first = sorted(filter(None, texts.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._plain: Any = None  # a copy of the tokenizer that makes no control tokens of text

    def hidden(
        self, messages: Sequence[tuple[str, str]], variables: Mapping[str, Any]
    ) -> HiddenChat | None:
        """The chat without control tokens; None if it has none, as nearly all chats."""
        given = (*messages, variables)
        if not any(map(self._pattern.search, _strings(given))):
            return None
        return HiddenChat(messages, variables, self._pattern)

    def without(self, encoding: Any, text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
        """The token ids of a text with those that stand for a hidden text replaced by those of its
        letters.

        Args:
            encoding: of the text.
            spans: where hidden texts are, in order.
        """
        ids: list[int] = []
        ahead = iter((*spans, (len(text), len(text) + 1)))
        start, end = next(ahead)
        for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            while end <= first:
                start, end = next(ahead)
            # A control token may take the spaces around its text with it.
            covers = token in self._ids and first <= start and end <= last
            ids += self._letters(text[first:last]) if covers else [token]
        return ids

    def _letters(self, text: str) -> list[int]:
        """The tokens of a text that is a control token's. They are taken after a line break,
        without the space that sentencepiece puts before a text."""
        if self._plain is None:
            self._plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
            self._plain.encode_special_tokens = True
        alone, both = (
            encoding.ids
            for encoding in self._plain.encode_batch(["\n", f"\n{text}"], add_special_tokens=False)
        )
        if both[: len(alone)] == alone:
            return list(both[len(alone) :])
        return list(self._plain.encode_batch([text], add_special_tokens=False)[0].ids)


class HiddenChat:
    """A chat whose control tokens are hidden.

    Args:
        pattern: finds control tokens.
    """

    def __init__(
        self,
        messages: Sequence[tuple[str, str]],
        variables: Mapping[str, Any],
        pattern: re.Pattern[str],
    ) -> None:
        self._pattern = pattern
        self._word = secrets.token_hex(8)
        self._texts: list[str] = []
        self.messages = [(self._hide(role), self._hide(content)) for role, content in messages]
        self.variables = self._hide(dict(variables))

    def shown(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """A rendered chat with its texts put back, and where they are."""
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        length = last = 0
        for found in re.finditer(f"{MARK}{self._word}-(\\d+){MARK}", rendered):
            hidden = self._texts[int(found[1])]
            before = rendered[last : found.start()]
            parts += (before, hidden)
            start = length + len(before)
            length = start + len(hidden)
            spans.append((start, length))
            last = found.end()
        return "".join((*parts, rendered[last:])), spans

    def _hide(self, value: Any) -> Any:
        match value:
            case str():
                return self._pattern.sub(self._number, value)
            case Mapping():
                return {self._hide(key): self._hide(item) for key, item in value.items()}
            case list() | tuple():
                return [self._hide(item) for item in value]
        return value

    def _number(self, found: re.Match[str]) -> str:
        self._texts.append(found[0])
        return f"{MARK}{self._word}-{len(self._texts) - 1}{MARK}"


def _strings(value: Any) -> Iterable[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for key, item in value.items():
                yield from _strings(key)
                yield from _strings(item)
        case list() | tuple():
            for item in value:
                yield from _strings(item)
