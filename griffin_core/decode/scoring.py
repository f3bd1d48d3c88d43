"""What a scoring session does: run the given continuation on the experts, read off its chances."""

from __future__ import annotations

import torch
from torch import Tensor

from griffin_core.decode.events import Scored
from griffin_core.decode.session import Session
from griffin_core.decode.step import decode_tokens
from griffin_core.decode.task import ScoreTask
from griffin_core.model.decoder import Decoder

STEP_TOKENS = 256
"""Continuation tokens a step: bounds the logits held at once to this times V."""


class Scoring:
    """``Work`` of a session that scores."""

    def __init__(self, decoder: Decoder, task: ScoreTask) -> None:
        self._decoder = decoder
        self._ids = torch.tensor(task.continuation, device=decoder.device)
        self._done = 0
        self._logprobs: list[float] = []
        self._greedy: list[bool] = []

    def begin(self, session: Session, last_hidden: Tensor) -> None:
        """The first continuation token is scored by the context's last hidden state."""
        self._hidden = last_hidden.to(self._decoder.device, self._decoder.dtype)[None]

    def step(self, session: Session) -> bool:
        """Scores up to STEP_TOKENS tokens."""
        assert session.cache is not None and session.view is not None
        ids = self._ids[self._done : self._done + STEP_TOKENS]
        self._done += ids.shape[0]
        is_last = self._done == self._ids.shape[0]
        run = ids[:-1] if is_last else ids  # the very last token is scored, never run
        hidden = self._hidden
        if run.shape[0]:
            made = decode_tokens(self._decoder, session.cache, session.view, run)
            hidden = torch.cat((hidden, made))
        self._read(self._decoder.head(hidden[: ids.shape[0]]), ids)
        self._hidden = hidden[-1:]
        if is_last:
            session.sink.put(
                Scored(
                    logprobs=tuple(self._logprobs),
                    greedy=tuple(self._greedy),
                    pruning=session.figures(self._decoder.spec.ff_width),
                )
            )
        return is_last

    def _read(self, logits: Tensor, ids: Tensor) -> None:
        logprobs = logits.log_softmax(dim=1)
        chosen = logprobs.gather(1, ids[:, None])[:, 0]
        self._logprobs += chosen.tolist()
        self._greedy += (chosen >= logprobs.amax(dim=1)).tolist()
