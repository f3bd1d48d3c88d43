"""When a completion ends, and what of its text may be shown."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from griffin_core.errors import InvalidRequest
from griffin_core.model.text_stream import TextStream

DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64


class FinishReason(Enum):
    """Why a completion ended."""

    EOS = "eos"
    STOP_SEQUENCE = "stop_sequence"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"


@dataclass(frozen=True, kw_only=True)
class StoppingParams:
    """When to stop. Ranges as in generation.proto.

    Raises:
        InvalidRequest: a value is out of range.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequest("stopping.max_tokens", self.max_tokens, ">= 1")
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


class StopChecker:
    """Follows one completion token by token.

    Args:
        text: the decoder of this completion's tokens.
        eos_ids: the model's end-of-sequence tokens.
        room: most tokens the context still takes.
    """

    def __init__(
        self, params: StoppingParams, text: TextStream, eos_ids: frozenset[int], room: int
    ) -> None:
        self._params = params
        self._text = text
        self._ends = params.stop_token_ids | (frozenset() if params.ignore_eos else eos_ids)
        self._room = room
        self._count = 0
        self._held = ""
        self.matched = ""
        """The stop string that ended the completion, once one has."""

    @property
    def remaining(self) -> int:
        """Most tokens that the completion still takes."""
        return min(self._params.max_tokens, self._room) - self._count

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """The text this token lets out, and why the completion ends with it, if it does.

        Text that may yet become a stop string is held back.
        """
        self._count += 1
        if token_id in self._ends:
            return self._finish(FinishReason.EOS)
        self._held += self._text.push(token_id)
        if (before := self._before_stop()) is not None:
            return before, FinishReason.STOP_SEQUENCE
        if self._count >= self._params.max_tokens:
            return self._finish(FinishReason.MAX_TOKENS)
        if self._count >= self._room:
            return self._finish(FinishReason.CONTEXT_LENGTH)
        split = len(self._held) - self._possible_start()
        out, self._held = self._held[:split], self._held[split:]
        return out, None

    def _finish(self, reason: FinishReason) -> tuple[str, FinishReason]:
        self._held += self._text.flush()
        if (before := self._before_stop()) is not None:  # the flushed text may complete one
            return before, FinishReason.STOP_SEQUENCE
        return self._held, reason

    def _before_stop(self) -> str | None:
        """The held text before the first stop string in it; None if there is none."""
        found = [(at, s) for s in self._params.stop if (at := self._held.find(s)) >= 0]
        if not found:
            return None
        at, self.matched = min(found, key=lambda match: (match[0], -len(match[1])))
        return self._held[:at]

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(
            (
                size
                for stop in self._params.stop
                for size in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:size])
            ),
            default=0,
        )
