"""Runs the next tokens of sessions that score, many sessions in one batch, and looks up
log-probabilities.

If a batch fails, all sessions are as they were before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_core.backends.batch import StepSequence
from griffin_core.engine.scoring import Chance, Scoring, Stage
from griffin_core.engine.session import Session
from griffin_core.forward.decode import Stepper
from griffin_core.forward.prefill import launch
from griffin_core.model.decoder import Decoder
from griffin_core.slim.views import SlimViews

STEP_TOKENS = 256
"""Most rows of logits in a turn of the loop, over all sessions that score. The logits are at most
this × V."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a step for one session.

    Args:
        rows: number of rows of logits.
    """

    session: Session
    turn: Scoring
    stage: Stage
    rows: int


def pieces_that_fit(sessions: Sequence[Session], room: int) -> list[Piece]:
    """The pieces of sessions in stage VIEW or CHOSEN, as large as in a step of their own, up to
    ``room`` rows in all. A session whose piece does not fit is left out."""
    pieces = []
    for session in sessions:
        turn = session.turn
        assert isinstance(turn, Scoring)
        if turn.stage in (Stage.VIEW, Stage.CHOSEN):
            rows = turn.rows_of_step(STEP_TOKENS)
            if rows <= room:
                pieces.append(Piece(session=session, turn=turn, stage=turn.stage, rows=rows))
                room -= rows
    return pieces


def pieces_of_step(sessions: Sequence[Session], room: int) -> list[list[Piece]]:
    """The pieces of a step, for sessions in the given order and up to ``room`` rows in all, grouped
    by what runs together: heads alone, dense passes, and tokens on experts."""
    together: dict[Stage, list[Piece]] = {stage: [] for stage in Stage}
    for session in sessions:
        if room <= 0:
            break
        turn = session.turn
        assert isinstance(turn, Scoring)
        stage = turn.stage
        rows = turn.rows_of_step(room)
        group = Stage.VIEW if stage is Stage.CHOSEN else stage
        together[group].append(Piece(session=session, turn=turn, stage=stage, rows=rows))
        room -= rows
    return [pieces for pieces in together.values() if pieces]


def look_up(
    decoder: Decoder, stepper: Stepper, views: SlimViews, pieces: Sequence[Piece]
) -> list[list[Chance]]:
    """Runs pieces that belong together in one batch, and looks up the tokens that follow. If it
    raises, all sessions are as they were before, and the same pieces may be run again.

    Returns:
        For each piece the scores of its targets, for ``Scoring.take``.
    """
    match pieces[0].stage:
        case Stage.CONTEXT:
            hidden = torch.stack([piece.turn.context_hidden for piece in pieces])
            return chances_of(
                pieces, torch.split_with_sizes(decoder.head(hidden), [1] * len(pieces))
            )
        case Stage.COUNTED:
            return _look_up_counted(decoder, pieces)
        case Stage.VIEW | Stage.CHOSEN:
            return _look_up_on_experts(stepper, views, pieces)


def _look_up_on_experts(
    stepper: Stepper, views: SlimViews, pieces: Sequence[Piece]
) -> list[list[Chance]]:
    sequences = on_experts(views, pieces)
    logits = stepper.launch(sequences, [None] * len(sequences)).logits
    return look_up_in(logits, pieces)


def on_experts(views: SlimViews, pieces: Sequence[Piece]) -> list[StepSequence]:
    """The sequences of pieces whose tokens run on experts, for a step of any stepper."""
    return [piece.turn.on_experts(piece.session, piece.rows, views) for piece in pieces]


def look_up_in(logits: Tensor, pieces: Sequence[Piece]) -> list[list[Chance]]:
    """Looks up the tokens that follow in the logits [N, V] of the step that ran ``on_experts``.
    Raises and returns as ``look_up``."""
    rows = [piece.rows for piece in pieces]
    chances = chances_of(pieces, torch.split_with_sizes(logits, rows))
    for piece in pieces:
        assert piece.session.cache is not None
        piece.session.cache.advance(piece.rows)
    return chances


def _look_up_counted(decoder: Decoder, pieces: Sequence[Piece]) -> list[list[Chance]]:
    parts = [piece.turn.counted(piece.session, piece.rows) for piece in pieces]
    run = launch(decoder, parts)
    logits = decoder.logits(run.hidden)
    rows = [piece.rows for piece in pieces]
    chances = chances_of(pieces, torch.split_with_sizes(logits, rows))
    read = {id(each.prompt): each for each in run.end()}
    for piece, part in zip(pieces, parts, strict=True):
        if each := read.get(id(part.prompt)):
            piece.turn.counted_to_its_end(piece.session, each)
    return chances


def chances_of(pieces: Sequence[Piece], logits: Sequence[Tensor]) -> list[list[Chance]]:
    """The scores of each piece's targets from its logits [T, V]. Waits for the device once."""
    columns, counts = [], []
    for piece, own in zip(pieces, logits, strict=True):
        targets = torch.tensor(piece.turn.targets(piece.rows), device=own.device)
        rows, tokens = targets.unbind(dim=1)
        finite = own.sum(dim=1).isfinite()  # NaN and infinite values carry over to the sum
        logprobs = own.log_softmax(dim=1)
        chosen = logprobs[rows, tokens]
        greedy = chosen >= logprobs.amax(dim=1)[rows]
        columns.append(torch.stack([chosen, greedy.float(), finite[rows].float()], dim=1))
        counts.append(len(targets))
    looked_up = iter(torch.cat(columns).tolist())
    return [
        [Chance(logprob, bool(greedy), bool(finite)) for logprob, greedy, finite in own]
        for own in ([next(looked_up) for _ in range(count)] for count in counts)
    ]
