"""Sampled tokens that a device may still be computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from griffin_core.backends.batch import StepSequence
from griffin_core.backends.transfers import on_device, to_host
from griffin_core.sampling.logprobs import Logprobs, RowLogprobs, logprobs_of


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The next token of a sequence.

    Args:
        token: its id; -1 if the logits were not finite.
        logprobs: its log-probabilities, if they were requested.
    """

    token: int
    logprobs: Logprobs | None = None


def drawn_rows(sequences: Sequence[StepSequence]) -> list[int]:
    """Returns the rows that a token is sampled from: the last row of each sequence that has a
    sampler slot, or all its rows."""
    ends = accumulate(len(each.token_ids) for each in sequences)
    return [
        row
        for each, end in zip(sequences, ends, strict=True)
        for row in range(end - _drawn_by(each), end)
    ]


def _drawn_by(sequence: StepSequence) -> int:
    """Returns the number of tokens that a sequence draws in a step."""
    if sequence.slot is None:
        return 0
    return len(sequence.token_ids) if sequence.draws_all else 1


class DrawLost(Exception):
    """Tokens were sampled and cannot be read. The sampler's state has advanced, so the sequences
    must not be run again. The exception's cause is the original error."""


class Draws(Protocol):
    """The sampled tokens of a step: one ``Draw`` or several."""

    @property
    def logits(self) -> Tensor:
        """[N, V] float32, a row for each token that was run."""
        ...

    def forget_logits(self) -> None:
        """Drops the reference to the logits: their memory may be needed before ``wait``."""
        ...

    def wait(self) -> list[Drawn]:
        """Waits for the device, and returns the tokens that each sequence draws, in order."""
        ...


class Draw:
    """The sampled tokens of one batch.

    Args:
        tokens: [B] int64 on the device.
        logits: [N, V] float32, all rows. Log-probabilities are computed from them now, since the
            next step may overwrite them.
        rows: [B], the row that each token was sampled from.
        top_logprobs: [B], as in ``Stepper.launch``.
    """

    def __init__(
        self,
        tokens: Tensor,
        logits: Tensor,
        rows: Sequence[int],
        top_logprobs: Sequence[int | None],
    ) -> None:
        self.logits = logits
        self._asked = {place: top for place, top in enumerate(top_logprobs) if top is not None}
        self._logprobs: RowLogprobs | None = None
        if self._asked:
            asked = on_device([rows[i] for i in self._asked], torch.int64, tokens.device)
            places = on_device(list(self._asked), torch.int64, tokens.device)
            most = max(self._asked.values())
            self._logprobs = logprobs_of(logits, asked, tokens[places], most).to_host()
        self._tokens = to_host(tokens)
        self._ready: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def forget_logits(self) -> None:
        """See ``Draws``."""
        self.logits = self.logits[:0].clone()

    @staticmethod
    def of(
        tokens: Tensor,
        logits: Tensor,
        sequences: Sequence[StepSequence],
        top_logprobs: Sequence[int | None],
    ) -> Draw:
        """Makes the draw of sequences whose rows are in the same order as the sequences.

        Args:
            tokens: int64 on the device: [B], those of ``drawn_rows``, or [N], one for each row.

        Raises:
            DrawLost: the tokens or their log-probabilities cannot be read.
        """
        drawn = drawn_rows(sequences)
        pairs = zip(sequences, top_logprobs, strict=True)
        tops = [top for each, top in pairs for _ in range(_drawn_by(each))]
        try:
            if len(drawn) < len(tokens):
                tokens = tokens[on_device(drawn, torch.int64, tokens.device)]
            return Draw(tokens, logits, drawn, tops)
        except Exception as error:
            raise DrawLost from error

    def wait(self) -> list[Drawn]:
        """See ``Draws``."""
        if self._ready is not None:
            self._ready.synchronize()
        drawn = [Drawn(token=token) for token in self._tokens.tolist()]
        if self._logprobs is not None:
            for index, (place, top) in enumerate(self._asked.items()):
                logprobs = self._logprobs.read(index, top)
                drawn[place] = Drawn(token=drawn[place].token, logprobs=logprobs)
        return drawn


@dataclass(frozen=True, kw_only=True)
class JoinedDraws:
    """Several draws, concatenated."""

    parts: Sequence[Draws]

    @property
    def logits(self) -> Tensor:
        return torch.cat([part.logits for part in self.parts])

    def forget_logits(self) -> None:
        """See ``Draws``."""
        for part in self.parts:
            part.forget_logits()

    def wait(self) -> list[Drawn]:
        """See ``Draws``."""
        return [drawn for part in self.parts for drawn in part.wait()]
