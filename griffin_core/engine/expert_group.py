"""One expert group: sessions that run on one expert set, chosen from their summed statistics
Σ_i s_i/√S_i (arXiv 2404.01365, section 4.3); and what a session holds while it runs on experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from griffin_core.backends.base import Layout
from griffin_core.engine.session import Session
from griffin_core.experts.selection import Selection, select_experts
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics, group_score
from griffin_core.forward.correction import corrected
from griffin_core.model.decoder import Decoder
from griffin_core.slim.views import SlimView, SlimViews, WholeView

STEPS_HELD = 16
"""Number of steps for which a group keeps its set."""

SHARE_KEPT = 0.05
"""A group keeps a layer's set while a new choice would change no more than this share of it
(docs/LOG.md has what that costs in quality)."""

Form = Literal["own", "shared", "dense"]
"""What a session runs on: its own set, that of its group, or all neurons."""


@dataclass(frozen=True)
class GroupKey:
    """What sessions that share an expert set have in common.

    Args:
        shares_with: see ``Session``.
        kind: see ``Selection``.
    """

    shares_with: str
    kind: Selection


class Seat:
    """A session in ``ExpertGroups``, and what it holds there.

    Args:
        zeroed_bytes: what it has acquired of the budget to run zeroed.
        prunes: whether it runs on fewer experts than all neurons.
    """

    def __init__(self, session: Session, zeroed_bytes: int, *, prunes: bool) -> None:
        self.session = session
        self.zeroed_bytes = zeroed_bytes
        self.prunes = prunes
        self.key = GroupKey(session.shares_with, session.selection.kind)
        self.form: Form = "dense"
        self.group: ExpertGroup | None = None
        self.view: SlimView | None = None
        self._zeroed: WholeView | None = None

    @property
    def slim(self) -> SlimSpec:
        """What its own statistic chose."""
        assert self.session.slim is not None
        return self.session.slim

    @property
    def auto(self) -> bool:
        """Whether its form may change. A score always runs on the experts that it was asked for."""
        return self.session.sharing == "auto" and self.prunes and self.one_row

    @property
    def one_row(self) -> bool:
        """Whether it mostly runs one token at a time. For a session that runs few steps of many
        tokens a copy does not pay."""
        return self.session.turn.layout == "gemv"

    def zeroed(self, views: SlimViews) -> WholeView:
        """All weights, zeroed outside its own set."""
        if self._zeroed is None:
            self._zeroed = views.zeroed(self.slim)
        return self._zeroed


class ExpertGroup:
    """Sessions on one expert set. A session that joins starts on the present set. The group chooses
    again at most every ``STEPS_HELD`` steps and keeps the layers that would hardly change; its one
    view takes over the other layers.

    Args:
        shares_with: see ``Session``.
    """

    def __init__(self, shares_with: str = "") -> None:
        self._shares_with = shares_with
        self.members: list[Seat] = []
        self.stale = True
        """Whether members have come or gone since the set was chosen."""
        self.slim: SlimSpec | None = None
        self.view: SlimView | None = None
        self._zeroed: WholeView | None = None
        self._chosen = self._laid_out = -STEPS_HELD
        self.rests = False
        """Whether nothing is left to do and all members have been told."""

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do."""
        return not self.stale and can_run(self.view) and not (self.view and self.view.pending)

    def chooses(self, step: int) -> bool:
        """Whether it would choose (again) before a step."""
        return self.stale and (self.slim is None or step - self._chosen >= STEPS_HELD)

    def advance(self, decoder: Decoder, views: SlimViews, step: int) -> None:
        """Chooses its set if that is due, and acquires or changes its view.

        Args:
            step: number of the step that comes next.

        Raises:
            Exception: its experts cannot be chosen, or its view cannot be built.
        """
        if self.chooses(step):
            # A first member brings its own set along; the group's first choice is yet to come.
            founds = self.slim is None and len(self.members) == 1
            self._choose(decoder, views)
            self._chosen = self._chosen if founds else step
        if self.view is not None and self.view.error is not None:
            raise self.view.error
        self._lay_out(views, step)

    def _choose(self, decoder: Decoder, views: SlimViews) -> None:
        chosen = select_group(decoder, [seat.session for seat in self.members])
        old = self.slim
        self.slim = chosen if old is None else kept_where_alike(old, chosen, SHARE_KEPT)
        sessions = [seat.session for seat in self.members]
        corrects = sessions[0].selection.correction.kind != "none"
        if len(sessions) > 1 and corrects:  # with a bias of all, not with what one has brought
            plain = replace(self.slim, correction=None)
            self.slim = corrected(decoder, plain, summed(sessions), sessions[0].selection)
        self.stale = False
        if self.slim is not old:
            self._zeroed = None
            if self.view is not None:
                views.change(self.view, self.slim)

    def _lay_out(self, views: SlimViews, step: int) -> None:
        """Acquires a view laid out for the number of rows that it is used for."""
        assert self.slim is not None
        alone = len(self.members) == 1
        layout: Layout = "gemv" if alone and self.members[0].one_row else "gemm"
        other = self.view is not None and self.view.layout != layout and views.copies
        # A layout for one row is slow with two rows; the other way round it hardly matters.
        if other and (layout == "gemm" or step - self._laid_out >= STEPS_HELD):
            self.drop_view(views)
        wanted = not views.copies or not alone or self.members[0].one_row
        if self.view is None and wanted and views.builds:
            self.view = views.acquire(self.slim, layout, own=True, shares_with=self._shares_with)
            self._laid_out = step

    def zeroed(self, views: SlimViews) -> WholeView:
        """All weights, zeroed outside the group's set."""
        if self._zeroed is None:
            assert self.slim is not None
            self._zeroed = views.zeroed(self.slim)
        return self._zeroed

    def drop_view(self, views: SlimViews) -> None:
        """Releases its view."""
        if self.view is not None:
            views.release(self.view)
            self.view = None


@torch.inference_mode()
def select_group(decoder: Decoder, members: Sequence[Session]) -> SlimSpec:
    """The experts of a group: those of its only member, or those that the members' summed
    statistics choose."""
    first = members[0]
    assert first.slim is not None
    if len(members) == 1:
        return first.slim
    own = [session.statistics for session in members if session.statistics is not None]
    score = group_score([each.s2 for each in own])
    together = summed(members)
    sums = torch.cat([score.square()[None], together.sums[1:]])  # policies take s squared
    return select_experts(
        Statistics(sums=sums, tokens=together.tokens),
        first.selection,
        magnitude=decoder.magnitudes,
        calibration=decoder.calibration,
    )


def summed(members: Sequence[Session]) -> Statistics:
    """The statistics of all tokens of several sessions."""
    own = [session.statistics for session in members if session.statistics is not None]
    return Statistics(
        sums=torch.stack([each.sums for each in own]).sum(dim=0),
        tokens=sum(each.tokens for each in own),
    )


def kept_where_alike(old: SlimSpec, new: SlimSpec, share: float) -> SlimSpec:
    """The new set, but with the old experts in every layer where no more than this share of them
    would change; the old object if that is so in all layers."""
    if old.counts != new.counts:  # a mixture would have another number of experts in all
        return new
    before, after = old.mask(), new.mask(old.experts.device)
    gone = (before & ~after).sum(dim=1)
    changes: list[bool] = (gone > share * before.sum(dim=1)).tolist()
    if not any(changes):
        return old
    pairs = zip(changes, old.layers, new.layers, strict=True)
    mixed = [theirs.to(own.device) if changed else own for changed, own, theirs in pairs]
    return SlimSpec.of_layers(old.intermediate_size, mixed)


def can_run(view: SlimView | None) -> bool:
    """Whether a step can run on a view."""
    return view is not None and view.ready and view.error is None
