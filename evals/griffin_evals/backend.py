"""The interface that answers the requests of an evaluation: a server (``remote``) or this process
(``local``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from griffin_client import Score as ClientScore
from griffin_core.offline.completion import Score
from griffin_evals.settings import Settings

Tokens = str | tuple[int, ...]
"""A text, or token ids."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that answers.

    Args:
        fingerprint: a hash of its configuration, data type and weights.
        context_length: the most tokens that it runs at once.
    """

    name: str
    fingerprint: str
    dtype: str
    context_length: int


@dataclass(frozen=True, kw_only=True)
class ScoreItem:
    """Continuations of one context, each scored independently.

    Args:
        name: its name in errors.
        context, continuations: all text or all token ids, none of them empty; at most
            ``MAX_CONTINUATIONS`` of ``griffin_core.engine.task``.
        seed: for policies that draw at random.
        special_tokens: whether a text gets the tokenizer's own; None for True.
    """

    name: str
    context: Tokens
    continuations: tuple[Tokens, ...]
    seed: int
    special_tokens: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One continuation's score.

    Args:
        logprob: the sum over its tokens, natural logarithm.
        greedy: whether each of its tokens is the most likely one.
        tokens: the number of its tokens.
        norm_mass: the experts' share of the activation norm, mean over layers.
    """

    logprob: float
    greedy: bool
    tokens: int
    norm_mass: float


def scored_of(score: Score | ClientScore) -> Scored:
    """Converts a score of the core or the SDK."""
    return Scored(
        logprob=score.logprob,
        greedy=score.greedy,
        tokens=len(score.tokens),
        norm_mass=score.pruning.mean_norm_mass,
    )


@dataclass(frozen=True, kw_only=True)
class GenerateItem:
    """A prompt to complete.

    Args:
        name: its name in errors.
        prompt: a text or token ids, not empty.
        max_tokens: the most tokens of the completion, >= 1.
        stop: strings that end it; its text ends before them.
        sampling: the sampling parameters, without the seed.
        seed: the seed of sampling and of policies that draw at random.
        special_tokens: whether a text gets the tokenizer's own; None for True.
    """

    name: str
    prompt: Tokens
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Mapping[str, float]
    seed: int
    special_tokens: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A completion; ``norm_mass`` as in ``Scored``. ``cut`` if the context length ended it."""

    text: str
    tokens: int
    norm_mass: float
    cut: bool


class Backend(Protocol):
    """Answers items as they come, in any order.

    ``answered`` is called with an item's index and its answer, by one thread at a time. What was
    answered before an error has been handed over by then.

    Raises:
        RequestRefused: an item cannot be answered; the error names it.
        ServerGone, OtherModel: see ``errors``.
    """

    @property
    def facts(self) -> ModelFacts: ...

    def score(
        self,
        items: Sequence[ScoreItem],
        settings: Settings,
        answered: Callable[[int, list[Scored]], None],
    ) -> None: ...

    def generate(
        self,
        items: Sequence[GenerateItem],
        settings: Settings,
        answered: Callable[[int, Generated], None],
    ) -> None: ...

    def close(self) -> None: ...


def calibrated_fingerprint(fingerprint: str, calibration_digest: str) -> str:
    """What answers depend on: the weights, and what was measured of them."""
    return f"{fingerprint}+{calibration_digest}" if calibration_digest else fingerprint
