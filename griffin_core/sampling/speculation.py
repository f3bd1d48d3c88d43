"""Speculation: tokens are drafted cheaply and verified together in one pass of the model.

A drafted token is accepted if the model draws that very token at its position. A draw depends on
its seed and position and not on how it came about, so the tokens are those of the same request
without speculation, whatever is drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from griffin_core.errors import InvalidRequest
from griffin_core.spec.choices import DraftSource, SpeculationMode, Verify

MAX_DRAFT_TOKENS = 16

LOOKUP_TOKENS, SLIM_TOKENS = 8, 4
"""The most tokens that are drafted at once unless a request says otherwise: copied ones, and those
that the model's own experts draw."""

PRIOR_TRIED, FORGETS = 4.0, 0.9
"""How many tried tokens the first guess of an acceptance counts as, and the weight that what was
tried keeps at each further draft."""

FIRST_GUESS: Mapping[DraftSource, float] = {"lookup": 0.5, "slim": 0.8}

FRUITLESS, RESTS = 16, 32
"""After so many tokens without a draft that pays, ``auto`` looks for none for so many tokens."""


@dataclass(frozen=True, kw_only=True)
class SpeculationParams:
    """How a request speculates.

    Args:
        mode: see ``choices.SpeculationMode``; None for the engine's default, see ``over``.
        verify: see ``choices.Verify``; None for dense with drafts of the slim view alone, else
            experts.
        draft_tokens: the most tokens that are drafted at once; None for 8 that are looked up, or 4
            of the slim view.

    Raises:
        InvalidRequest: there is no such mode or verification, the slim view is to verify itself, or
            the number is out of range.
    """

    mode: SpeculationMode | None = None
    verify: Verify | None = None
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        modes, ways = get_args(SpeculationMode), get_args(Verify)
        if self.mode is not None and self.mode not in modes:
            raise InvalidRequest("speculation", self.mode, ", ".join(modes))
        if self.verify is not None and self.verify not in ways:
            raise InvalidRequest("verify", self.verify, ", ".join(ways))
        if self.mode == "slim" and self.verify == "experts":
            raise InvalidRequest("verify", "experts with speculation slim", "dense")
        if self.mode == "off" and (self.verify is not None or self.draft_tokens is not None):
            name = "draft_tokens" if self.verify is None else "verify"
            value = f"{getattr(self, name)} with speculation off"
            raise InvalidRequest(name, value, "a speculation that drafts")
        most = self.draft_tokens
        if most is not None and not (isinstance(most, int) and 1 <= most <= MAX_DRAFT_TOKENS):
            raise InvalidRequest("draft_tokens", most, f"[1, {MAX_DRAFT_TOKENS}]")

    def over(self, default: SpeculationMode) -> SpeculationParams:
        """Returns these parameters with a mode.

        Raises:
            InvalidRequest: the verification does not fit the default.
        """
        return self if self.mode else replace(self, mode=default)

    @property
    def lossless(self) -> bool:
        """Whether its tokens are those of the dense model: all of them are verified dense."""
        verifies_dense = self.verify == "dense" or (self.verify is None and self.mode == "slim")
        return self.mode not in (None, "off") and verifies_dense

    def drafts_by(self, source: DraftSource) -> bool:
        """Whether tokens may come from this source."""
        return self.mode == source or (
            self.mode == "auto" and (source == "lookup" or self.lossless)
        )

    def most(self, source: DraftSource) -> int:
        """The most tokens of a draft from this source."""
        return self.draft_tokens or (LOOKUP_TOKENS if source == "lookup" else SLIM_TOKENS)


NO_SPECULATION = SpeculationParams(mode="off")


@dataclass
class Acceptance:
    """How many drafted tokens of one source were accepted, and the share that may be expected.

    Args:
        guess: the share expected before any was tried.
        accepted: those that the completion got; what was drawn after its end counts in the share.
    """

    guess: float
    drafted: int = 0
    accepted: int = 0
    _tried: float = 0.0
    _held: float = 0.0

    @property
    def share(self) -> float:
        """The expected share: of a token whose draft was accepted up to it."""
        return (self._held + PRIOR_TRIED * self.guess) / (self._tried + PRIOR_TRIED)

    def note(self, drafted: int, held: int) -> None:
        """Notes how many drafted tokens a verification drew too."""
        self.drafted += drafted
        self.fade()
        self._tried += min(held + 1, drafted)
        self._held += held

    def fade(self) -> None:
        """Gives what was tried less weight: a share that has fallen is tried again in time."""
        self._tried *= FORGETS
        self._held *= FORGETS


def draft_lengths(
    shares: Sequence[float],
    most: Sequence[int],
    others: int,
    cost: Callable[[int], float],
) -> list[int]:
    """Returns how many tokens each sequence should have verified, so that a pass gives the most
    tokens for its time.

    Args:
        shares: of each sequence, the chance that a token is accepted if the ones before it were.
        most: how many tokens each has drafted.
        others: the number of further sequences in the pass, of one token each.
        cost: the seconds of a pass by its number of tokens.
    """
    gains = sorted(
        (
            (share**place, index)
            for index, (share, count) in enumerate(zip(shares, most, strict=True))
            for place in range(1, count + 1)
        ),
        key=lambda gain: (-gain[0], gain[1]),
    )
    if not gains:
        return [0] * len(shares)
    rows = others + len(shares)
    tokens, best_rate, best = float(rows), rows / max(cost(rows), 1e-9), 0
    for taken, (gain, _) in enumerate(gains, start=1):
        tokens += gain
        rate = tokens / max(cost(rows + taken), 1e-9)
        if rate > best_rate:
            best_rate, best = rate, taken
    lengths = [0] * len(shares)
    for _, index in gains[:best]:
        lengths[index] += 1
    return lengths


def best_length(
    share: float, most: int, others: int, draft_s: float, cost: Callable[[int], float]
) -> int:
    """Returns how many tokens a sequence should draft one after the other, so that drafting and
    verifying give the most tokens for their time; 0 if a plain step does.

    Args:
        share: the chance that a token is accepted if the ones before it were.
        most: the most tokens to draft.
        others: the number of tokens in the pass without the drafted ones.
        draft_s: the seconds of the step that drafts a token.
        cost: the seconds of a pass by its number of tokens.
    """
    tokens = float(others)
    best_rate, best = tokens / max(cost(others), 1e-9), 0
    for length in range(1, most + 1):
        tokens += share**length
        rate = tokens / max(length * draft_s + cost(others + length), 1e-9)
        if rate > best_rate:
            best_rate, best = rate, length
    return best
