"""What a scoring session does: run the given continuation on the experts, read off its chances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_core.decode.events import Scored
from griffin_core.decode.session import Session
from griffin_core.decode.task import ScoreTask
from griffin_core.errors import NonFiniteLogits
from griffin_core.model.decoder import Decoder
from griffin_core.model.linear import Rows

STEP_TOKENS = 256
"""Continuation tokens a step: bounds the logits held at once to this times V."""


class Scoring:
    """``Work`` of a session that scores."""

    rows: Rows = "many"

    def __init__(self, decoder: Decoder, task: ScoreTask) -> None:
        self._decoder = decoder
        self._continuation = task.continuation
        self._ids = torch.tensor(task.continuation, device=decoder.device)
        self._logprobs: list[float] = []
        self._greedy: list[bool] = []

    def begin(self, session: Session, logits: Tensor) -> Scored | None:
        """Scores the first continuation token by the logits [V] after the context. Returns the
        turn's last event when nothing is left to do."""
        return self._score(session, logits[None])

    def tokens(self) -> Sequence[int]:
        """Up to STEP_TOKENS more of those scored already; the very last is never run."""
        begin = len(self._logprobs) - 1
        return self._continuation[begin:-1][:STEP_TOKENS]

    def read(self, session: Session, logits: Tensor) -> Scored | None:
        """Scores the tokens after those that were run, by the logits [T, V] there. Returns the
        turn's last event when nothing is left to do."""
        return self._score(session, logits)

    def flush(self, session: Session) -> None:
        """A score is whole or none."""

    def _score(self, session: Session, logits: Tensor) -> Scored | None:
        """Scores the next tokens of the continuation, one for each row.

        Raises:
            NonFiniteLogits: a row has a value that is NaN or infinite.
        """
        begin = len(self._logprobs)
        ids = self._ids[begin : begin + logits.shape[0]]
        finite = logits.sum(dim=1).isfinite()  # NaN and infinite values carry over to the sum
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise NonFiniteLogits(position=len(session.tokens) + begin + first)
        logprobs = logits.log_softmax(dim=1)
        chosen = logprobs.gather(1, ids[:, None])[:, 0]
        self._logprobs += chosen.tolist()
        self._greedy += (chosen >= logprobs.amax(dim=1)).tolist()
        if len(self._logprobs) < len(self._ids):
            return None
        return Scored(
            logprobs=tuple(self._logprobs),
            greedy=tuple(self._greedy),
            pruning=session.figures(self._decoder.spec.ff_width),
        )
