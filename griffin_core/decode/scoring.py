"""What scoring sessions do: look up the chances of given continuations, each behind the context.

The *tail* of a continuation c is the context's last token and c without its last token: what the
model expects after token i of the tail is the chance of c[i]. The two modes differ in what the tail
runs on:

* *generation*: its first token was read with the context, dense. The others run on the experts that
  the context chose.
* *classification*: all its tokens but the last run dense and add to the context's statistic. What
  that chooses is what the last one runs on. The context is read but for its last token.

At density 1 classification needs no statistic: the whole tail runs on all neurons.

A session here says what comes next; ``look_up`` runs that for many sessions in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from griffin_core.decode.events import ContinuationScored, Scored
from griffin_core.decode.session import Session
from griffin_core.decode.step import StepTokens
from griffin_core.decode.task import ScoreTask
from griffin_core.errors import NonFiniteLogits
from griffin_core.experts.expert_set import ExpertSet
from griffin_core.experts.selection import Selection
from griffin_core.model.decoder import Decoder
from griffin_core.model.linear import Rows
from griffin_core.prefill import Part, Prompt
from griffin_core.slim.zeroed import ZeroedLayers, zeroed_bytes


class Stage(Enum):
    """What a session's next chances are looked up after."""

    CONTEXT = "context"
    """The context, which has been read: all continuations have their first token there."""
    VIEW = "view"
    """Tokens of the tail that run on what the session runs on."""
    COUNTED = "counted"
    """Tokens of the tail that run dense and add to the statistic."""
    CHOSEN = "chosen"
    """The tail's last token, which runs on the experts that the statistic chooses."""


class Chance(NamedTuple):
    """Of a continuation's token.

    Args:
        logprob: its natural logarithm.
        greedy: no other token is more likely here.
        finite: whether all logits here are.
    """

    logprob: float
    greedy: bool
    finite: bool


class Scoring:
    """``Work`` of a session that scores.

    Args:
        selection: how experts are chosen.
    """

    rows: Rows = "many"

    def __init__(self, decoder: Decoder, task: ScoreTask, selection: Selection) -> None:
        neurons = decoder.spec.ff_width
        self.chooses = task.mode == "classification" and selection.experts_of(neurons) < neurons
        """Whether each continuation chooses experts of its own, for one token."""
        self._decoder = decoder
        self._task = task
        self._scored: list[list[Chance]] = [[] for _ in task.continuations]
        self._index = 0  # of the continuation that is being scored
        self._context_hidden: Tensor | None = None
        self._context_choice: tuple[Tensor, ExpertSet, tuple[float, ...]] | None = None
        self._dense_tail: Prompt | None = None

    def begin(self, session: Session, hidden: Tensor) -> None:
        """The context is read.

        Args:
            hidden: [D], what the head reads after the last token that was read.
        """
        if self._task.mode == "generation":
            self._context_hidden = hidden
        elif self.chooses:
            assert session.s2 is not None and session.experts is not None
            self._context_choice = session.s2, session.experts, session.norm_mass

    @property
    def runs_tokens(self) -> bool:
        """Whether tokens are left to run when the context is read."""
        return any(len(c) > 1 for c in self._task.continuations) or self._context_hidden is None

    @property
    def needs_view(self) -> bool:
        """Whether what comes next runs on the session's view."""
        return self.stage is Stage.VIEW

    @property
    def stage(self) -> Stage:
        """What comes next."""
        if self._context_hidden is not None:
            return Stage.CONTEXT
        if not self.chooses:
            return Stage.VIEW
        return Stage.CHOSEN if self._left == 1 else Stage.COUNTED

    @property
    def _left(self) -> int:
        return len(self._task.continuations[self._index]) - len(self._scored[self._index])

    def rows_of_step(self, room: int) -> int:
        """Tokens of the tail that run next, up to ``room``; or 1, for the context's last."""
        match self.stage:
            case Stage.CONTEXT | Stage.CHOSEN:
                return 1
            case Stage.VIEW:
                return min(self._left, room)
            case Stage.COUNTED:
                return min(self._left - 1, room)

    @property
    def context_hidden(self) -> Tensor:
        """In stage CONTEXT: [D], what the head reads."""
        assert self._context_hidden is not None
        return self._context_hidden

    def on_experts(self, session: Session, rows: int) -> StepTokens:
        """In stages VIEW and CHOSEN: the next tokens of the tail, and what they run on."""
        assert session.cache is not None
        begin = len(self._scored[self._index])
        tokens = self._tail[begin : begin + rows]
        if self.stage is Stage.CHOSEN:
            assert session.experts is not None
            zeroed = ZeroedLayers(self._decoder, session.experts)
            return StepTokens(cache=session.cache, view=zeroed, token_ids=tokens)
        assert session.view is not None
        return StepTokens(cache=session.cache, view=session.view.layers, token_ids=tokens)

    def counted(self, session: Session, rows: int) -> Part:
        """In stage COUNTED: the next tokens of the tail."""
        if self._dense_tail is None:
            self._dense_tail = Prompt(
                self._decoder,
                self._tail[:-1],
                session.selection,
                cache=session.cache,
                s2=session.s2,
            )
        return Part(prompt=self._dense_tail, tokens=rows)

    def targets(self, rows: int) -> list[tuple[int, int]]:
        """What is looked up after the next rows: pairs of a row and a token."""
        if self.stage is Stage.CONTEXT:
            return [(0, continuation[0]) for continuation in self._task.continuations]
        begin = len(self._scored[self._index])
        tokens = self._task.continuations[self._index][begin : begin + rows]
        return list(enumerate(tokens))

    def take(self, session: Session, chances: Sequence[Chance]) -> Scored | None:
        """Takes what was looked up. Returns the turn's last event when nothing is left to do.

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
            pruning=session.figures(self._decoder.spec.ff_width),
        )

    def counted_to_its_end(self, session: Session, s2: Tensor, experts: ExpertSet) -> None:
        """The statistic has come to the tail's last token, and has chosen."""
        self._dense_tail = None
        session.chosen(s2, experts)

    def flush(self, session: Session) -> None:
        """A score is whole or none."""

    @property
    def _tail(self) -> Sequence[int]:
        return (self._task.prompt[-1], *self._task.continuations[self._index][:-1])

    @staticmethod
    def _density(session: Session, stage: Stage) -> float:
        if stage is Stage.CHOSEN:
            assert session.experts is not None
            return session.experts.density
        return 1.0 if stage is Stage.COUNTED else session.density

    def _go_on(self, session: Session) -> bool:
        """Goes back to the context if a continuation has come to its end. True if all have."""
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
    """Most bytes that a session holds whose continuations choose experts of their own: what lets
    one token run zeroed; and three statistics [L, F] float32, of a pass, of the tail with it, and
    as rounded for a handoff."""
    statistic = 4 * len(decoder.layers) * decoder.spec.ff_width
    return 3 * statistic + zeroed_bytes(decoder)
