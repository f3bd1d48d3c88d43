"""What one request that speculates keeps: its tokens, and how many drafted ones were accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from griffin_core.sampling.prompt_lookup import PromptLookup
from griffin_core.sampling.speculation import (
    FIRST_GUESS,
    FRUITLESS,
    RESTS,
    Acceptance,
    SpeculationParams,
)
from griffin_core.spec.choices import DraftSource


class Drafting:
    """A request's drafts.

    Args:
        tokens: of the session so far.
        ends: tokens after which none is drafted.
    """

    def __init__(
        self, params: SpeculationParams, tokens: Sequence[int], ends: frozenset[int]
    ) -> None:
        self.params = params
        self._ends = ends
        self._lookup = PromptLookup(tokens) if params.drafts_by("lookup") else None
        self._acceptance: dict[DraftSource, Acceptance] = {
            source: Acceptance(guess) for source, guess in FIRST_GUESS.items()
        }
        self._fruitless = 0
        self._rests = 0

    @property
    def acceptance(self) -> Mapping[DraftSource, Acceptance]:
        """How many tokens were drafted and accepted, by source."""
        return MappingProxyType(self._acceptance)

    @property
    def weighs(self) -> bool:
        """Whether it drafts only what pays."""
        return self.params.mode == "auto"

    @property
    def looks(self) -> bool:
        """Whether it may draft now."""
        return self.params.mode not in (None, "off") and not self._rests

    def push(self, token: int) -> None:
        """Adds a token that was drawn."""
        self._rests = max(0, self._rests - 1)
        if self._lookup is not None:
            self._lookup.push(token)

    def look_up(self, most: int) -> tuple[int, ...]:
        """Returns up to ``most`` tokens that were looked up."""
        if self._lookup is None:
            return ()
        return self._lookup.draft(min(most, self.params.most("lookup")))

    def ends_at(self, token: int) -> bool:
        """Whether the completion is likely to end with a token."""
        return token in self._ends

    def note_search(self, *, found: bool) -> None:
        """Notes whether there was a draft that pays. After many searches for nothing it rests,
        since steps of sessions that may draft wait for the host."""
        self._fruitless = 0 if found else self._fruitless + 1
        if self.weighs and self._fruitless >= FRUITLESS:
            self._fruitless, self._rests = 0, RESTS
            for acceptance in self._acceptance.values():
                acceptance.fade()

    def accept(self, source: DraftSource) -> None:
        """Counts a drafted token that the completion gets."""
        self._acceptance[source].accepted += 1

    def note(self, source: DraftSource, drafted: int, held: int) -> None:
        """Notes how many drafted tokens a verification drew too."""
        self._acceptance[source].note(drafted, held)
