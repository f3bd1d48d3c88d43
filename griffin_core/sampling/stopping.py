"""Stopping: when a completion ends, and which part of its text may be shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import compress

from griffin_core.errors import InvalidRequest
from griffin_core.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64


class FinishReason(StrEnum):
    """Why a completion ended. A reason equals its lower-case name: ``reason == "eos"``."""

    EOS = "eos"
    STOP_SEQUENCE = "stop_sequence"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"


@dataclass(frozen=True, kw_only=True)
class StoppingParams:
    """The stopping parameters of a request. The ranges are those of generation.proto.

    Raises:
        InvalidRequest: a value is out of range.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop_string: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequest("stopping.max_tokens", self.max_tokens, ">= 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise InvalidRequest(
                "stopping.min_tokens", self.min_tokens, f"[0, {self.max_tokens}], max_tokens"
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                "stopping.stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS}"
            )
        for index, text in enumerate(self.stop):
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise InvalidRequest(
                    f"stopping.stop[{index}]",
                    f"{len(text)} characters",
                    f"1 to {MAX_STOP_CHARACTERS} characters",
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequest(
                "stopping.stop_token_ids",
                f"{len(self.stop_token_ids)} ids",
                f"at most {MAX_STOP_TOKENS}",
            )


@dataclass(frozen=True, kw_only=True)
class Split:
    """A completion cut by a stop string, split into its first tokens and the text after them.

    Args:
        tokens: the number of tokens.
        text: the visible text of those tokens.
        rest: the shown text after it.
    """

    tokens: int
    text: str
    rest: str


class StopChecker:
    """Follows one completion token by token.

    Stop strings are searched in the text with special tokens shown. The one that is complete first
    counts; if several end at the same character, the longest. So token boundaries make no
    difference.

    Args:
        tokenizer: decodes the completion's tokens.
        before: the tokens before the completion.
        eos_ids: the model's end-of-sequence tokens.
        room: the most tokens that still fit the context.
    """

    def __init__(
        self,
        params: StoppingParams,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        *,
        before: Sequence[int],
        room: int,
    ) -> None:
        self._params = params
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(before, skip_special_tokens=params.skip_special_tokens)
        self._ends = params.stop_token_ids | (frozenset() if params.ignore_eos else eos_ids)
        self._room = room
        self._pieces: list[str] = []
        """The text of each token, special tokens shown."""
        self._ended = False
        """Whether the last token is an end token, which has no text."""
        self._visible = bytearray()
        """For each character of that text, whether it is to be shown."""
        self._held = ""
        """The end of that text, which is held back."""
        self._passed = 0
        """The length of the held text that belongs to the first ``min_tokens`` tokens."""
        self._match = (0, 0)
        """The positions in the whole text where the stop string begins and where the shown text
        ends."""
        self.matched = ""
        """The stop string that ended the completion, once one has."""

    @property
    def remaining(self) -> int:
        """The most tokens that may still be added to the completion."""
        return min(self._params.max_tokens, self._room) - len(self._pieces)

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Adds a token. Returns the text that can be shown now, and the finish reason if the
        completion ends.

        Text that may still become a stop string is held back.
        """
        self._pieces.append("")
        if token_id in self._ends:
            self._ended = True
            return self._finish(FinishReason.EOS)
        self._add(self._stream.push(token_id), visible=True)
        if self._params.skip_special_tokens:  # the stream has left out the special token
            self._add(self._tokenizer.special_text(token_id) or "", visible=False)
        if self._find_stop():
            return self._cut(), FinishReason.STOP_SEQUENCE
        if len(self._pieces) >= self._params.max_tokens:
            return self._finish(FinishReason.MAX_TOKENS)
        if len(self._pieces) >= self._room:
            return self._finish(FinishReason.CONTEXT_LENGTH)
        return self._let_out(len(self._held) - self._possible_start()), None

    def splits(self) -> Iterator[Split]:
        """Yields, after a stop string, the ways to split the shown completion, those with the most
        tokens first. No split contains an end token, since it has no shown text."""
        start, end = self._match
        text = "".join(self._pieces)
        at = len(text)
        for tokens in range(len(self._pieces), -1, -1):
            if tokens < len(self._pieces):
                at -= len(self._pieces[tokens])
            if at <= end and tokens <= len(self._pieces) - self._ended:
                visible = "".join(compress(text[:at], self._visible))
                rest = "".join(compress(text[at:start], self._visible[at:start]))
                rest += text[max(at, start) : end]
                yield Split(tokens=tokens, text=visible, rest=rest)

    def _add(self, text: str, *, visible: bool) -> None:
        self._pieces[-1] += text
        self._visible += bytes([visible]) * len(text)
        self._held += text
        if len(self._pieces) <= self._params.min_tokens:
            self._passed = len(self._held)

    def _let_out(self, size: int) -> str:
        """Removes ``size`` characters from the held text, and returns those that are to be
        shown."""
        begin = len(self._visible) - len(self._held)
        shown = "".join(compress(self._held, self._visible[begin : begin + size]))
        self._held = self._held[size:]
        self._passed = max(0, self._passed - size)
        return shown

    def _finish(self, reason: FinishReason) -> tuple[str, FinishReason]:
        self._add(self._stream.flush(), visible=True)
        if self._find_stop():  # the flushed text may complete a stop string
            return self._cut(), FinishReason.STOP_SEQUENCE
        return self._let_out(len(self._held)), reason

    def _find_stop(self) -> bool:
        """Returns whether the held text contains a stop string that ends after the first
        ``min_tokens`` tokens, and records the match."""
        ends = []
        for stop in self._params.stop:
            at = self._held.find(stop, max(0, self._passed - len(stop) + 1))
            if at >= 0:
                ends.append((at + len(stop), at))
        if not ends:
            return False
        end, start = min(ends)
        begin = len(self._visible) - len(self._held)
        self.matched = self._held[start:end]
        shown = end if self._params.include_stop_string else start
        self._match = begin + start, begin + shown
        return True

    def _cut(self) -> str:
        """Returns the text up to the stop string, or up to its end if the request includes stop
        strings in the output, even those that are special tokens."""
        before = self._let_out(self._match[0] - len(self._visible) + len(self._held))
        return before + (self.matched if self._params.include_stop_string else "")

    def _possible_start(self) -> int:
        """Returns the length of the longest suffix of the held text that is a prefix of a stop
        string."""
        return max(
            (
                size
                for stop in self._params.stop
                for size in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:size])
            ),
            default=0,
        )
