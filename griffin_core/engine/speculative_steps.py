"""Steps that draft tokens and verify them: see ``sampling.speculation``.

A draft is verified in the step that all sessions share: the session's rows are its last token and
the drafted ones, and a token is drawn after each of them. It is taken if all draws before it were
the drafted tokens. Draws that depend on the tokens before, by penalties or bans, are made one after
the other. What a rejected draft has written into the KV cache is overwritten: the cache only
advances over tokens that were taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from griffin_core.backends.batch import DENSE, DRAWN, StepSequence
from griffin_core.backends.transfers import on_device
from griffin_core.engine.expert_groups import ExpertGroups
from griffin_core.engine.generation import Generation
from griffin_core.engine.pauses import pauses_at
from griffin_core.engine.ports import Observer
from griffin_core.engine.session import Session
from griffin_core.errors import InvalidRequest
from griffin_core.forward.decode import Stepper
from griffin_core.forward.draws import Draw, DrawLost, Drawn, Draws
from griffin_core.model.decoder import Decoder
from griffin_core.sampling.drafting import Drafting
from griffin_core.sampling.sampler import Sampler
from griffin_core.sampling.speculation import best_length, draft_lengths
from griffin_core.slim.views import WholeView
from griffin_core.spec.choices import DraftSource

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Drafted tokens of a session, at least one."""

    source: DraftSource
    token_ids: tuple[int, ...]


Drafts = Mapping[str, Draft]
"""By session id."""


class SpeculativeSteps:
    """Drafts tokens for sessions, and draws from what has verified them. Owned by the engine's
    thread.

    Args:
        groups: say what steps cost.
        observer: is told how many drafted tokens were accepted.
    """

    def __init__(
        self, decoder: Decoder, sampler: Sampler, groups: ExpertGroups, observer: Observer
    ) -> None:
        self._decoder = decoder
        self._sampler = sampler
        self._groups = groups
        self._observer = observer
        self._drawing: Sequence[Session] = ()  # those that draw drafts which are not read yet

    @staticmethod
    def waits(sessions: Sequence[Session]) -> bool:
        """Whether one of these sessions may draft: all its tokens must then have been read before
        its next step."""
        return any(drafting_of(session).looks for session in sessions)

    def draft(self, stepper: Stepper, sessions: Sequence[Session]) -> Drafts:
        """Drafts tokens for the sessions of the next step for which that pays. No token of theirs
        is in flight."""
        looks = [s for s in sessions if drafting_of(s).looks and _room(s) > 0]
        found = {s.session_id: drafting_of(s).look_up(_room(s)) for s in looks}
        weighed = [s for s in looks if found[s.session_id] and drafting_of(s).weighs]
        sure = sum(len(ids) for ids in found.values())
        sure -= sum(len(found[s.session_id]) for s in weighed)
        lengths = draft_lengths(
            [drafting_of(s).acceptance["lookup"].share for s in weighed],
            [len(found[s.session_id]) for s in weighed],
            len(sessions) - len(weighed) + sure,
            self._cost(stepper),
        )
        for session, length in zip(weighed, lengths, strict=True):
            found[session.session_id] = found[session.session_id][:length]
        _trim(found, stepper, len(sessions))
        drafts = {
            session_id: Draft(source="lookup", token_ids=ids)
            for session_id, ids in found.items()
            if ids
        }
        rest = [session for session in looks if session.session_id not in drafts]
        rows = len(sessions) + sum(len(draft.token_ids) for draft in drafts.values())
        drafts |= self._draft_slim(stepper, rest, rows)
        for session in looks:
            drafting_of(session).note_search(found=session.session_id in drafts)
        return drafts

    def _cost(self, stepper: Stepper) -> Callable[[int], float]:
        """The seconds of a dense step by its rows."""
        costs, most = self._groups.costs, stepper.most_rows

        def seconds(rows: int) -> float:
            if most is not None and rows > most:
                return float("inf")
            return costs.step_s(dense=rows, own=(), shared=())

        return seconds

    def _draft_slim(self, stepper: Stepper, sessions: Sequence[Session], rows: int) -> Drafts:
        """Drafts on the experts of sessions that have them, all together.

        Args:
            rows: of the step that verifies, without these drafts.
        """
        self._drawing = ()
        most = self._slim_lengths(stepper, sessions, rows)
        if stepper.most_rows is not None and rows + sum(most.values()) > stepper.most_rows:
            most = {}
        made: dict[str, list[int]] = {session_id: [] for session_id in most}
        able = [session for session in sessions if session.session_id in most]
        try:
            while left := [s for s in able if len(made[s.session_id]) < most[s.session_id]]:
                sequences = [slim_step(s, made[s.session_id]) for s in left]
                self._drawing = left
                tokens = stepper.launch(sequences, [None] * len(left)).wait()
                self._drawing = ()
                for session, drawn in zip(left, tokens, strict=True):
                    own = made[session.session_id]
                    if drawn.token >= 0:  # otherwise the logits were not finite
                        own.append(drawn.token)
                    if drawn.token < 0 or drafting_of(session).ends_at(drawn.token):
                        most[session.session_id] = len(own)
        finally:
            for session in able:
                assert session.slot is not None
                self._sampler.count(session.slot, made[session.session_id], -1)
        return {
            session_id: Draft(source="slim", token_ids=tuple(own))
            for session_id, own in made.items()
            if own
        }

    def _slim_lengths(
        self, stepper: Stepper, sessions: Sequence[Session], rows: int
    ) -> dict[str, int]:
        """How many tokens to draft, for each session that has a slim view to draft with."""
        costs, most = self._groups.costs, {}
        for session in sessions:
            drafting, view = drafting_of(session), session.view
            if not drafting.params.drafts_by("slim"):
                continue
            if view is None or view.slim is None or isinstance(view, WholeView):
                continue  # dense for now, or zeroed, which costs as much
            limit = min(_room(session), drafting.params.most("slim"))
            if drafting.weighs:
                limit = best_length(
                    drafting.acceptance["slim"].share,
                    limit,
                    rows,
                    costs.step_s(dense=0, own=(view.slim.density,), shared=()),
                    self._cost(stepper),
                )
            if limit:
                most[session.session_id] = limit
        return most

    @torch.inference_mode()
    def draw_one_by_one(
        self, sessions: Sequence[Session], drafts: Drafts, draw: Draws
    ) -> dict[str, list[Drawn]]:
        """Draws the tokens of the sessions of a step whose draws depend on one another: after each
        row in turn, for as long as the draw before was the drafted token.

        Args:
            sessions: those of the step, in the order of its rows.
        """
        first_row, rows = {}, 0
        for session in sessions:
            first_row[session.session_id] = rows
            rows += 1 + len(tokens_of(drafts.get(session.session_id)))
        left = [s for s in sessions if s.session_id in drafts and not _at_once(s)]
        drawn: dict[str, list[Drawn]] = {session.session_id: [] for session in left}
        place = 0
        while left := [s for s in left if self._may_draw(s, drafts[s.session_id], place)]:
            index = [first_row[session.session_id] + place for session in left]
            own = draw.logits[on_device(index, torch.int64, draw.logits.device)]
            drawn_now = draw_next(self._sampler, left, own, ahead=place).wait()
            going = []
            for session, token in zip(left, drawn_now, strict=True):
                drawn[session.session_id].append(token)
                ids = drafts[session.session_id].token_ids
                if place < len(ids) and token.token == ids[place]:
                    going.append(session)
            left, place = going, place + 1
        return drawn

    def _may_draw(self, session: Session, draft: Draft, place: int) -> bool:
        """Bans the tokens that the next one must not be; returns whether one is left."""
        try:
            generation_of(session).ban(session, self._sampler, draft.token_ids[:place])
        except InvalidRequest:  # the next step meets it again, and ends the session
            return False
        return True

    def note(self, drafting: Drafting, draft: Draft, drawn: Sequence[Drawn]) -> None:
        """Notes how many tokens of a draft were drawn too."""
        pairs = zip(draft.token_ids, drawn, strict=False)
        held = list(takewhile(lambda pair: pair[0] == pair[1].token, pairs))
        drafting.note(draft.source, len(draft.token_ids), len(held))
        self._observer.speculated(draft.source, len(draft.token_ids), len(held))

    def miscounted(self, session: Session) -> bool:
        """Whether a session's penalties may count a token that it does not have, after drafting has
        failed."""
        return generation_of(session).sampling.penalizes and session in self._drawing


def drafting_of(session: Session) -> Drafting:
    """The drafts of a session that generates."""
    return generation_of(session).drafting


def tokens_of(draft: Draft | None) -> tuple[int, ...]:
    """The tokens of a draft; none of no draft."""
    return () if draft is None else draft.token_ids


def step_sequence(session: Session, draft: Draft | None) -> StepSequence:
    """A session's part of a step: its last token, and what was drafted."""
    assert session.cache is not None and session.view is not None
    last = DRAWN if session.in_flight else session.tokens[-1]
    alone = draft is not None and not _at_once(session)
    return StepSequence.next_of(
        session.cache,
        (last, *tokens_of(draft)),
        slim_id=DENSE if drafting_of(session).params.lossless else session.view.slim_id,
        slot=None if alone else session.slot,
        draws_all=draft is not None,
    )


def _at_once(session: Session) -> bool:
    """Whether the step itself draws after all rows of a session's draft."""
    return generation_of(session).draws_alike(session)


def density_of(session: Session) -> float:
    """The share of the FF neurons that a session's next token runs on."""
    return 1.0 if drafting_of(session).params.lossless else session.density


def slim_step(session: Session, drafted: Sequence[int]) -> StepSequence:
    """The step that drafts the next token of a session after these."""
    assert session.cache is not None and session.view is not None
    return StepSequence(
        first_slot=session.cache.first_slot,
        cached=session.cache.length + len(drafted),
        token_ids=(drafted[-1] if drafted else session.tokens[-1],),
        slim_id=session.view.slim_id,
        slot=session.slot,
    )


def _room(session: Session) -> int:
    """The most tokens that may be drafted: one more is drawn after them. None runs past the end of
    a warm-up or past a check."""
    assert session.cache is not None
    cache = session.cache
    left = min(generation_of(session).remaining, cache.capacity - cache.length)
    if (pause := pauses_at(session)) is not None:
        left = min(left, pause - cache.length)
    return left - 1


def _trim(found: dict[str, tuple[int, ...]], stepper: Stepper, sessions: int) -> None:
    """Shortens the longest drafts until the step has no more rows than pay."""
    if stepper.most_rows is None:
        return
    while sessions + sum(map(len, found.values())) > stepper.most_rows and any(found.values()):
        longest = max(found, key=lambda session_id: len(found[session_id]))
        found[longest] = found[longest][:-1]


def generation_of(session: Session) -> Generation:
    """The turn of a session that generates."""
    assert isinstance(session.turn, Generation)
    return session.turn


def draw_next(
    sampler: Sampler, sessions: Sequence[Session], logits: Tensor, *, ahead: int = 0
) -> Draw:
    """Draws a token for each session, all together.

    Args:
        logits: [B, V] float32, a row for each session.
        ahead: how many tokens of each were drawn since its last one.

    Raises:
        DrawLost: the tokens were drawn and cannot be read.
    """
    slots = [session.slot for session in sessions if session.slot is not None]
    positions = [len(session.tokens) + ahead for session in sessions]
    tokens = sampler.sample(
        logits,
        on_device(slots, torch.int64, logits.device),
        on_device(positions, torch.int64, logits.device),
    )
    tops = [generation_of(session).top_logprobs for session in sessions]
    try:
        return Draw(tokens, logits, range(len(sessions)), tops)
    except Exception as error:
        raise DrawLost from error
