"""Drafts by looking up: what followed the last tokens where they stood before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHORTEST, LONGEST = 2, 16
"""The fewest and the most last tokens that are looked up. One token alone is rarely followed by the
same tokens again."""


class PromptLookup:
    """The tokens of a prompt and its completion so far, 4 bytes each.

    Args:
        tokens: all tokens so far.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._length = len(tokens)
        self._tokens = np.empty(max(64, 2 * len(tokens)), dtype=np.int32)
        self._tokens[: len(tokens)] = tokens

    def push(self, token: int) -> None:
        """Adds a token."""
        if self._length == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
        self._tokens[self._length] = token
        self._length += 1

    def draft(self, most: int) -> tuple[int, ...]:
        """Returns up to ``most`` tokens that followed the longest run of last tokens that stood
        somewhere before, where it stood last; none if fewer than ``SHORTEST`` tokens did."""
        tokens = self._tokens[: self._length]
        if len(tokens) <= SHORTEST:
            return ()
        ends = np.flatnonzero(tokens[:-1] == tokens[-1])
        matched = 1
        while matched < LONGEST and len(ends):
            longer = ends[ends >= matched]
            longer = longer[tokens[longer - matched] == tokens[-1 - matched]]
            if not len(longer):
                break
            ends, matched = longer, matched + 1
        if not len(ends) or matched < SHORTEST:
            return ()
        after = int(ends[-1]) + 1
        return tuple(tokens[after : after + most].tolist())
