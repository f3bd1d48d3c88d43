"""Who runs on whose experts: expert groups.

A group is one expert set that its sessions run on. Alone, a session runs on what its own prompt
chose. Together, sessions of one density and policy run on the set of their summed statistics,
Σ_i s_i/√S_i (arXiv 2404.01365, section 4.3), chosen again whenever one joins or leaves.
"""

from __future__ import annotations

import torch

from griffin_core.decode.session import Session, Sharing, ViewPool
from griffin_core.experts.expert_set import ExpertSet
from griffin_core.experts.selection import PolicyName, Selection, select_experts
from griffin_core.experts.statistic import group_score
from griffin_core.model.decoder import Decoder
from griffin_core.model.linear import Rows
from griffin_core.slim.crossover import PrivateLimit
from griffin_core.slim.views import SlimView, SlimViews

Kind = tuple[float, PolicyName]
"""Density and policy: what sessions of one group have in common."""


class ExpertGroup:
    """Sessions on one expert set, and the view they run on.

    A new choice is built beside the old view, which the sessions go on with meanwhile; who has just
    joined waits for the new one.
    """

    def __init__(self) -> None:
        self.members: list[Session] = []
        self.stale = True
        """Whether the set must be chosen (again)."""
        self._view: SlimView | None = None
        self._next: SlimView | None = None
        self._next_members: list[Session] = []

    @property
    def choosing(self) -> bool:
        """Whether the group waits for a choice or its view."""
        return self.stale or self._next is not None

    def advance(self, decoder: Decoder, views: SlimViews) -> None:
        """Goes on with what the group waits for.

        Raises:
            Exception: its experts cannot be chosen, or its view cannot be built.
        """
        if self._next is not None and self._next.error is not None:
            raise self._next.error
        if self._next is not None and self._next.ready:
            self._switch(views)
        if self.stale and self._next is None:
            if len(self.members) < 2:  # it has reserved one view, and is to hold no two
                self._drop_view(views)
            self._next_members = list(self.members)
            rows: Rows = self.members[0].work.rows if len(self.members) == 1 else "many"
            self._next = views.acquire(select_group(decoder, self.members), rows)
            self.stale = False
            if self._next.ready:  # somebody had the same experts
                self._switch(views)

    def shrunk(self, views: SlimViews) -> None:
        """A member has left, and what it had reserved is no longer the group's."""
        self.stale = True
        if len(self.members) < 2 and self._next is not None:
            self._drop_view(views)

    def disband(self, views: SlimViews) -> None:
        """Gives back what the group holds."""
        self._drop_view(views)
        if self._next is not None:
            views.release(self._next)
            self._next = None

    def _switch(self, views: SlimViews) -> None:
        for session in self._next_members:
            if session in self.members:
                session.use(self._next)
        if self._view is not None:
            views.release(self._view)
        self._view, self._next = self._next, None

    def _drop_view(self, views: SlimViews) -> None:
        if self._view is not None:
            views.release(self._view)
            self._view = None
        for session in self.members:
            session.use(None)


class ExpertGroups:
    """All groups of an engine. Owned by the engine's thread.

    Args:
        private_limit: up to how many sessions of a density private sets pay, for ``auto``.
    """

    def __init__(self, decoder: Decoder, views: SlimViews, private_limit: PrivateLimit) -> None:
        self._decoder = decoder
        self._views = views
        self.private_limit = private_limit
        self._groups: dict[str, ExpertGroup] = {}  # by session id
        self._shared: dict[Kind, ExpertGroup] = {}
        self._auto: dict[Kind, list[Session]] = {}  # those that still run alone

    def pool(self, selection: Selection, sharing: Sharing) -> ViewPool | None:
        """With whom a session reserves its view: two for a shared group, which builds a new one
        beside the old, and those that ``auto`` leaves private."""
        if sharing == "private":
            return None
        return ViewPool(
            density=selection.density,
            policy=selection.policy,
            most_views=2 + self.private_limit(selection.density),
        )

    def join(self, session: Session) -> None:
        """A session has its statistic and its own experts and is to run on some."""
        kind = _kind(session)
        match session.sharing:
            case "private":
                self._put(session, ExpertGroup())
            case "shared":
                self._put(session, self._shared_group(kind))
            case "auto":
                alone = self._auto.setdefault(kind, [])
                alone.append(session)
                if kind in self._shared or len(alone) > self.private_limit(kind[0]):
                    del self._auto[kind]
                    for member in alone:
                        self.leave(member)
                        self._put(member, self._shared_group(kind))
                else:
                    self._put(session, ExpertGroup())
        self._groups[session.session_id].advance(self._decoder, self._views)

    def leave(self, session: Session) -> None:
        """A session has ended, or goes elsewhere. Without effect if it is in no group."""
        kind = _kind(session)
        if session in (alone := self._auto.get(kind, [])):
            alone.remove(session)
            if not alone:
                del self._auto[kind]
        group = self._groups.pop(session.session_id, None)
        if group is None:
            return
        group.members.remove(session)
        session.use(None)
        if group.members:
            group.shrunk(self._views)
            return
        group.disband(self._views)
        if self._shared.get(kind) is group:
            del self._shared[kind]

    @property
    def choosing(self) -> bool:
        """Whether some group waits for a choice or its view."""
        return any(group.choosing for group in self._groups.values())

    def advance(self) -> list[tuple[Session, Exception]]:
        """Goes on with every group's choice.

        Returns:
            The sessions whose group failed, and how.
        """
        failed: list[tuple[Session, Exception]] = []
        for group in {id(group): group for group in self._groups.values()}.values():
            try:
                group.advance(self._decoder, self._views)
            except Exception as error:
                failed += [(session, error) for session in group.members]
        return failed

    def _put(self, session: Session, group: ExpertGroup) -> None:
        group.members.append(session)
        group.stale = True
        self._groups[session.session_id] = group

    def _shared_group(self, kind: Kind) -> ExpertGroup:
        return self._shared.setdefault(kind, ExpertGroup())


@torch.inference_mode()
def select_group(decoder: Decoder, members: list[Session]) -> ExpertSet:
    """The experts of a group: the one session's own, or those of their summed statistics."""
    first = members[0]
    assert first.experts is not None
    if len(members) == 1:
        return first.experts
    score = group_score([session.s2 for session in members if session.s2 is not None])
    indices = select_experts(
        score.square(),  # policies take a statistic's square
        first.selection,
        magnitude=decoder.magnitudes,
    )
    return ExpertSet(ff_width=first.experts.ff_width, indices=indices)


def _kind(session: Session) -> Kind:
    return session.selection.density, session.selection.policy
