"""A turn that scores: the log-probabilities of given continuations after a context.

The *tail* of a continuation c is the context's last token, then c without its last token: the
logits after token i of the tail give the log-probability of c[i]. The two modes differ in what the
tail runs on:

* *generation*: the tail's first token was read with the context, dense. The others run on the
  experts that the context chose.
* *classification*: the context is read without its last token. All tokens of the tail except its
  last run dense and add to the context's statistic, which then chooses the experts that the last
  token runs on.

At density 1 classification needs no statistic: the whole tail runs on all neurons.

A ``Scoring`` says what its session runs next; ``look_up`` runs that for many sessions in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from griffin_core.backends.base import Layout
from griffin_core.backends.batch import StepSequence
from griffin_core.engine.events import ContinuationScored, Scored
from griffin_core.engine.session import Session
from griffin_core.engine.task import ScoreTask
from griffin_core.errors import NonFiniteLogits
from griffin_core.experts.selection import Selection
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics
from griffin_core.forward.correction import corrected
from griffin_core.forward.prompt import (
    Part,
    Prompt,
)
from griffin_core.forward.prompt_pass import PromptRead
from griffin_core.model.decoder import Decoder
from griffin_core.slim.views import SlimViews, WholeView
from griffin_core.slim.zeroed import zeroed_bytes


class Stage(Enum):
    """What a session runs next, to look up the log-probabilities after it."""

    CONTEXT = "context"
    """Nothing: the last logits of the context score the first token of every continuation."""
    VIEW = "view"
    """Tokens of the tail that run on the session's view."""
    COUNTED = "counted"
    """Tokens of the tail that run dense and add to the statistic."""
    CHOSEN = "chosen"
    """The tail's last token, which runs on the experts that the statistic chose."""


class Chance(NamedTuple):
    """The score of one token of a continuation.

    Args:
        logprob: natural logarithm of its probability.
        greedy: no other token is more likely at its position.
        finite: whether all logits at its position are finite.
    """

    logprob: float
    greedy: bool
    finite: bool


class Scoring:
    """A ``Turn`` that scores given continuations.

    Args:
        selection: how experts are chosen.
    """

    layout: Layout = "gemm"

    def __init__(self, decoder: Decoder, task: ScoreTask, selection: Selection) -> None:
        neurons = decoder.spec.intermediate_size
        prunes = selection.count(neurons) < neurons
        self.chooses = task.mode == "classification" and prunes
        """Whether each continuation chooses experts of its own, on which one token runs."""
        self._decoder = decoder
        self._task = task
        self._scored: list[list[Chance]] = [[] for _ in task.continuations]
        self._index = 0  # of the continuation that is being scored
        self._context_hidden: Tensor | None = None
        self._context_choice: tuple[Statistics, SlimSpec, tuple[float, ...]] | None = None
        self._dense_tail: Prompt | None = None
        self._chosen_view: WholeView | None = None  # what stage CHOSEN runs on

    def begin(self, session: Session, hidden: Tensor) -> None:
        """Called once the context has been read.

        Args:
            hidden: [D], the input of the head after the last token that was read.
        """
        if self._task.mode == "generation":
            self._context_hidden = hidden
        elif self.chooses:
            assert session.statistics is not None and session.slim is not None
            self._context_choice = session.statistics, session.slim, session.norm_mass

    @property
    def runs_tokens(self) -> bool:
        """Whether tokens have to run after the context has been read."""
        return any(len(c) > 1 for c in self._task.continuations) or self._context_hidden is None

    @property
    def needs_view(self) -> bool:
        """Whether the next tokens run on the session's view."""
        return self.stage is Stage.VIEW

    @property
    def stage(self) -> Stage:
        """What the session runs next."""
        if self._context_hidden is not None:
            return Stage.CONTEXT
        if not self.chooses:
            return Stage.VIEW
        return Stage.CHOSEN if self._left == 1 else Stage.COUNTED

    @property
    def _left(self) -> int:
        return len(self._task.continuations[self._index]) - len(self._scored[self._index])

    def rows_of_step(self, room: int) -> int:
        """Number of rows of logits that the next step needs, at most ``room``."""
        match self.stage:
            case Stage.CONTEXT | Stage.CHOSEN:
                return 1
            case Stage.VIEW:
                return min(self._left, room)
            case Stage.COUNTED:
                return min(self._left - 1, room)

    @property
    def context_hidden(self) -> Tensor:
        """In stage CONTEXT: [D], the input of the head."""
        assert self._context_hidden is not None
        return self._context_hidden

    def on_experts(self, session: Session, rows: int, views: SlimViews) -> StepSequence:
        """In stages VIEW and CHOSEN: the next tokens of the tail, and what they run on."""
        assert session.cache is not None
        begin = len(self._scored[self._index])
        tokens = self._tail[begin : begin + rows]
        if self.stage is Stage.CHOSEN:
            if self._chosen_view is None:
                assert session.slim is not None and session.statistics is not None
                # Fitted here to every choice alike, wherever the context was read.
                plain = replace(session.slim, correction=None)
                session.slim = corrected(
                    self._decoder, plain, session.statistics, session.selection
                )
                self._chosen_view = views.zeroed(session.slim)
            slim_id = self._chosen_view.slim_id
        else:
            assert session.view is not None
            slim_id = session.view.slim_id
        return StepSequence.next_of(session.cache, tokens, slim_id=slim_id)

    def counted(self, session: Session, rows: int) -> Part:
        """In stage COUNTED: the next tokens of the tail."""
        if self._dense_tail is None:
            self._dense_tail = Prompt(
                self._decoder,
                self._tail[:-1],
                session.selection,
                cache=session.cache,
                statistics=session.statistics,
            )
        return Part(prompt=self._dense_tail, tokens=rows)

    def targets(self, rows: int) -> list[tuple[int, int]]:
        """Pairs of a row and the token whose log-probability is looked up in it."""
        if self.stage is Stage.CONTEXT:
            return [(0, continuation[0]) for continuation in self._task.continuations]
        begin = len(self._scored[self._index])
        tokens = self._task.continuations[self._index][begin : begin + rows]
        return list(enumerate(tokens))

    def take(self, session: Session, chances: Sequence[Chance]) -> Scored | None:
        """Stores scores that were looked up. Returns the turn's last event once all are there.

        Raises:
            NonFiniteLogits: a row has a value that is NaN or infinite.
        """
        stage = self.stage
        for place, chance in enumerate(chances):
            if not chance.finite:
                ahead = 0 if stage is Stage.CONTEXT else len(self._scored[self._index]) + place
                raise NonFiniteLogits(position=len(self._task.prompt) + ahead)
        if stage is Stage.CONTEXT:
            self._context_hidden = None
            for scored, chance in zip(self._scored, chances, strict=True):
                scored.append(chance)
            session.ran(1.0, len(chances))
        else:
            self._scored[self._index] += chances
            self._chosen_view = None
            session.ran(self._density(session, stage), len(chances))
        if not self._go_on(session):
            return None
        return Scored(
            continuations=tuple(
                ContinuationScored(
                    logprobs=tuple(chance.logprob for chance in scored),
                    greedy=tuple(chance.greedy for chance in scored),
                )
                for scored in self._scored
            ),
            pruning=session.pruning_stats(self._decoder.spec),
        )

    def counted_to_its_end(self, session: Session, read: PromptRead) -> None:
        """Called once the statistics cover all of the tail but its last token."""
        self._dense_tail = None
        session.chosen(read.statistics, read.slim)

    def flush(self, session: Session) -> None:
        """Does nothing: a score is returned whole or not at all."""

    @property
    def _tail(self) -> Sequence[int]:
        return (self._task.prompt[-1], *self._task.continuations[self._index][:-1])

    @staticmethod
    def _density(session: Session, stage: Stage) -> float:
        if stage is Stage.CHOSEN:
            assert session.slim is not None
            return session.slim.density
        return 1.0 if stage is Stage.COUNTED else session.density

    def _go_on(self, session: Session) -> bool:
        """Rewinds to the context at the end of a continuation. True if all have been scored."""
        while not self._left:
            assert session.cache is not None
            session.cache.rewind(session.prompt_tokens)
            if self._index + 1 == len(self._scored):
                return True
            self._index += 1
            if self._context_choice is not None:
                session.chosen(*self._context_choice)
        return False


def choice_bytes(decoder: Decoder) -> int:
    """The most bytes that a session holds if its continuations choose their own experts, beside
    their correction: the masks with which one token runs zeroed, and three statistics [3, L, F]
    float32: those of a pass, those of the tail with this pass, and the latter as a handoff would
    round them."""
    statistic = 12 * len(decoder.layers) * decoder.spec.intermediate_size
    return 3 * statistic + zeroed_bytes(decoder)
