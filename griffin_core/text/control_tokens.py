"""Control tokens in what callers write into a chat: they become text.

A chat template puts control tokens around the messages, such as the end of a turn. If a message
itself contains the text of such a token, a tokenizer makes the token of it, and whoever writes the
message could end the turn and write the next one, in another role. So these texts are hidden while
the template is rendered, and the tokens that the tokenizer makes of them are replaced by those of
their letters.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers.models import WordLevel

from griffin_core.errors import InvalidRequest

MARK = "\ue0f7"
"""A character of the private use area. Between two of them a random word and a number stand for a
hidden text. Nobody who writes a message knows the word."""

LIKE_CONTROL = re.compile("<[|\uff5c].+[|\uff5c]>", re.DOTALL)
"""Added tokens of this form are control tokens, also where a tokenizer does not say that they are
special, as DeepSeek's that begin a turn."""

ROLE = re.compile(r"[\w.-]{1,64}")
ROLE_ALLOWED = "1 to 64 letters, digits and _ . -"


class ControlTokens:
    """Hides the control tokens of a tokenizer in a chat.

    Args:
        backend: the tokenizer.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        texts = {
            token_id: token.content
            for token_id, token in added.items()
            if token.content and (token.special or LIKE_CONTROL.fullmatch(token.content))
        }
        self._ids = texts.keys()
        self._beginnings = {text[:2] for text in texts.values()}
        # Finds them in one walk, without the interpreter's lock, however many there are.
        self._finder = tokenizers.Tokenizer(WordLevel({"": 0}, unk_token=""))
        self._finder.add_special_tokens(
            [tokenizers.AddedToken(text, normalized=False, special=True) for text in texts.values()]
        )
        # A copy of the tokenizer that makes none of them of text.
        self._plain: Any = None
        self._letters: dict[str, list[int]] = {}

    def hidden(
        self, messages: Sequence[tuple[str, str]], variables: Mapping[str, Any]
    ) -> HiddenChat | None:
        """The chat without control tokens; None if it has none, as nearly all chats.

        Raises:
            InvalidRequest: a role is no word, and could make a control token together with what the
                template puts around it.
        """
        for index, (role, _) in enumerate(messages):
            if not ROLE.fullmatch(role):
                raise InvalidRequest(f"messages[{index}].role", role, ROLE_ALLOWED)
        given = list(_strings((*messages, variables)))
        spans = dict(zip(given, map(self._spans, given), strict=True))
        return HiddenChat(messages, variables, spans) if any(spans.values()) else None

    def without(
        self, encoding: Any, text: str, spans: Sequence[tuple[int, int]], *, most: int | None
    ) -> list[int]:
        """The token ids of a text with those that stand for a hidden text replaced by those of its
        letters; not many more than ``most``.

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
            ids += self._ids_of_letters(text[first:last]) if covers else [token]
            if most is not None and len(ids) > most:
                break
        return ids

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where the control tokens of a text are."""
        if not any(beginning in text for beginning in self._beginnings):  # as nearly always
            return []
        (found,) = self._finder.encode_batch([text], add_special_tokens=False)
        return [span for token, span in zip(found.ids, found.offsets, strict=True) if token]

    def _ids_of_letters(self, text: str) -> list[int]:
        """The tokens of a text that is a control token's. They are taken after a line break,
        without the space that sentencepiece puts before a text."""
        if text not in self._letters:
            plain = self._plain or self._made_plain()
            alone, both = (
                encoding.ids
                for encoding in plain.encode_batch(["\n", f"\n{text}"], add_special_tokens=False)
            )
            fits = both[: len(alone)] == alone
            ids = both[len(alone) :] if fits else plain.encode(text, add_special_tokens=False).ids
            if len(text) > MOST_REMEMBERED:
                return list(ids)
            self._letters[text] = list(ids)
        return self._letters[text]

    def _made_plain(self) -> Any:
        """A copy of the tokenizer with every control token as text, complete before others see it.
        Added tokens that are not special cannot be left out of one that exists."""
        plain: Any = without_added(self._backend, self._ids)
        plain.encode_special_tokens = True
        self._plain = plain
        return plain


MOST_REMEMBERED = 64
"""The most characters of a text whose letters are remembered: one that takes spaces with it may
come in any length."""


def without_added(backend: Any, ids: Iterable[int]) -> Any:
    """A copy of a tokenizer without some of its added tokens, which are text to it."""
    described = json.loads(backend.to_str())
    left_out = set(ids)
    described["added_tokens"] = [
        token for token in described.get("added_tokens", []) if token["id"] not in left_out
    ]
    described["post_processor"] = None  # it may name them, and nothing is added to letters
    return tokenizers.Tokenizer.from_str(json.dumps(described))


class HiddenChat:
    """A chat whose control tokens are hidden.

    Args:
        spans: where the control tokens of each of its texts are.
    """

    def __init__(
        self,
        messages: Sequence[tuple[str, str]],
        variables: Mapping[str, Any],
        spans: Mapping[str, Sequence[tuple[int, int]]],
    ) -> None:
        self._spans = spans
        self._word = secrets.token_hex(8)
        self._texts: list[str] = []
        self.messages = [(role, self._hide(content)) for role, content in messages]
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
                return "".join(self._pieces(value))
            case Mapping():
                return {self._hide(key): self._hide(item) for key, item in value.items()}
            case list() | tuple():
                return [self._hide(item) for item in value]
        return value

    def _pieces(self, text: str) -> Iterator[str]:
        last = 0
        for start, end in self._spans[text]:
            yield text[last:start]
            self._texts.append(text[start:end])
            yield f"{MARK}{self._word}-{len(self._texts) - 1}{MARK}"
            last = end
        yield text[last:]


def _strings(value: Any) -> Iterator[str]:
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
