"""The tokens that a completion must not draw next."""

from __future__ import annotations

from collections.abc import Sequence

from griffin_core.errors import InvalidRequest
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.stopping import StoppingParams


class Bans:
    """The tokens that bad words and ``min_tokens`` ban at each position of one completion.

    Args:
        eos_ids: the model's end-of-sequence tokens.
        vocab_size: V.

    Raises:
        InvalidRequest: no token is left for the first position.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        stopping: StoppingParams,
        eos_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        # A tokenizer may know more tokens than the model can draw.
        words = [word for word in sampling.bad_words_ids if max(word) < vocab_size]
        self._always = frozenset(word[0] for word in words if len(word) == 1)
        self._words = [word for word in words if len(word) > 1]
        self._min_tokens = stopping.min_tokens
        self._ends = eos_ids | stopping.stop_token_ids
        self._allowed = sampling.allowed_token_ids
        self._vocab_size = vocab_size
        self.lookback = max((len(word) - 1 for word in self._words), default=0)
        """The number of tokens before a position that determine what is banned there."""
        self.at(0, ())

    def at(self, place: int, before: Sequence[int]) -> frozenset[int]:
        """Returns the tokens that are banned at one position.

        Args:
            place: the number of tokens of the completion before it.
            before: the last of those tokens, up to ``lookback``.

        Raises:
            InvalidRequest: no token is left.
        """
        banned = self._always
        if place < self._min_tokens:
            banned |= self._ends
        if self._words:
            made = tuple(before)
            banned |= {w[-1] for w in self._words if made[len(made) - len(w) + 1 :] == w[:-1]}
        if self._allowed <= banned if self._allowed else len(banned) >= self._vocab_size:
            raise InvalidRequest(
                "sampling.allowed_token_ids" if self._allowed else "sampling.bad_words",
                f"no token left to draw after {place} tokens of the completion",
                "at least one token that neither bad_words nor min_tokens bans",
            )
        return banned
