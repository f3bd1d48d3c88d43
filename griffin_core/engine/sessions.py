"""A session: everything one conversation owns in Decode, and what frees it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, get_args

from torch import Tensor

from griffin_core.backends.base import Layout
from griffin_core.engine.events import Event, PruningFigures, Sink
from griffin_core.experts.expert_set import ExpertSet
from griffin_core.experts.selection import PolicyName, Selection
from griffin_core.kv.cache import KvCache
from griffin_core.slim.base import RunView
from griffin_core.spec import choices

Sharing = choices.Sharing
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)


class State(Enum):
    """Where a session is in its life."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    IDLE = "idle"


@dataclass(frozen=True, kw_only=True)
class ViewPool:
    """Sessions of one kind reserve their slim views together.

    Args:
        sharing, density, policy: what they have in common.
        most_views: they never hold more than this, however many they are.
    """

    sharing: Sharing
    density: float
    policy: PolicyName
    most_views: int


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """The most bytes a session can come to hold.

    Args:
        kv: of its KV cache.
        zeroed: of what lets it run on all weights, zeroed.
        view: of a slim view.
        pool: with which sessions it shares views; None if its view is its own.
    """

    kv: int
    zeroed: int = 0
    view: int = 0
    pool: ViewPool | None = None


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """A session as others may see it.

    Args:
        reserved_bytes: the most its KV cache, what lets it run zeroed, and its slim view if that is
            its own, can come to hold.
    """

    session_id: str
    state: State
    context_tokens: int
    generated_tokens: int
    age_s: float
    idle_s: float
    reserved_bytes: int
    pruning: PruningFigures


@dataclass(frozen=True, kw_only=True)
class SessionPage:
    """Some of an engine's sessions, oldest first.

    Args:
        last: names the page's end, for the page after it; None if this is the last.
        total: how many sessions there are in all.
    """

    sessions: Sequence[SessionInfo]
    last: int | None
    total: int


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What an engine holds.

    Args:
        sessions: how many are in each state.
        limit_bytes: what views and caches may hold together.
    """

    sessions: dict[State, int]
    slim_view_bytes: int
    kv_cache_bytes: int
    limit_bytes: int


@dataclass
class Clock:
    """When things happened to the current turn, on ``time.monotonic``; 0 for not yet."""

    arrived: float = 0.0
    admitted: float = 0.0
    prefilled: float = 0.0
    first_token: float = 0.0
    view_ready: float = 0.0
    last_token: float = 0.0
    stalled: float = 0.0
    """Since when its reader lags; 0 if it keeps up."""
    selection_s: float = 0.0


class Work(Protocol):
    """What a session does once its prompt is read: ``Generation`` or ``Scoring``. It puts events
    into the session's sink, but for the last one, which it returns."""

    layout: Layout
    """For how many rows at once its slim view is laid out."""
    chooses: bool
    """Whether it sees to its experts itself: ``ExpertGroups`` then has it on all neurons."""

    def flush(self, session: Session) -> None:
        """Puts out what it still holds back, for the turn fails."""
        ...


class Session:
    """One conversation's KV cache, statistic, experts and slim view, and its current turn.

    The engine's thread owns it. It is freed when the scheduler drops it.

    Args:
        session_id: known to the client.
    """

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.number = 0
        """Sessions are numbered from 1 in the order in which the scheduler took them in."""
        self.turn_id = ""
        self.opened = time.monotonic()
        self.state = State.QUEUED
        self.tokens: list[int] = []
        """All tokens of all turns, but those after a stop string; the cache may lack the last
        ones."""
        self.generated_tokens = 0
        self.slot: int | None = None
        """The sampler's slot, while it generates."""
        self.in_flight = 0
        """Tokens that the device draws and the host has not read yet."""
        self.reservation = Reservation(kv=0)
        self.cache: KvCache | None = None
        self.s2: Tensor | None = None
        self.experts: ExpertSet | None = None
        """What its own statistic chose; in a group it may run on others. None between turns."""
        self.view: RunView | None = None
        """What its next step runs on; None before it has joined ``ExpertGroups``, which owns it."""
        self.view_bytes = 0
        """What it holds beyond the model's own weights to run on its experts."""
        self._mass: tuple[ExpertSet | None, tuple[float, ...]] | None = None

    def begin_turn(
        self,
        turn_id: str,
        *,
        arrived: float,
        prompt: Sequence[int],
        capacity: int,
        selection: Selection,
        sharing: Sharing,
        work: Work,
        sink: Sink[Event],
        keep: bool,
    ) -> None:
        """Sets a turn up.

        Args:
            turn_id: whoever holds it may feed, fail or cancel this turn, and no other.
            arrived: when the call came, on ``time.monotonic``.
            prompt: its token ids.
            capacity: tokens the KV cache must hold by the end of it.
            work: what to do after prefill.
            sink: where the events go.
            sharing: with whom it may run on one expert set.
            keep: stay idle for a next turn when done.
        """
        self.turn_id = turn_id
        self.clock = Clock(arrived=arrived)
        self.turn_start = self.cache.length if self.cache else 0
        self.tokens += prompt
        self.prompt_tokens = len(self.tokens) - self.turn_start
        """Tokens prefilled for this turn."""
        self.turn_generated = 0
        self.in_flight = 0
        self._ran = 0
        self._ran_dense = 0
        self._ran_density = 0.0
        self.capacity = capacity
        self.selection = selection
        self.sharing = sharing
        self.work = work
        self.sink = sink
        self.keep = keep

    def rest(self) -> None:
        """Its turn is over and it is kept: it holds its tokens, its cache and its statistic, and
        nothing that the next turn makes anew. An engine may keep tens of thousands."""
        self._mass = None, self.norm_mass
        self.experts = None
        del self.work, self.sink

    def use(self, view: RunView | None) -> None:
        """Runs on a view from the next step on."""
        self.view = view

    @property
    def density(self) -> float:
        """The share of the FF neurons that its next step runs on."""
        experts = None if self.view is None else self.view.experts
        return 1.0 if experts is None else experts.density

    def ran(self, density: float, tokens: int = 1) -> None:
        """Notes what tokens of the turn came of: the density of the step that made them, taken
        when the step began. A turn's first token comes of its prompt, which runs dense."""
        self._ran += tokens
        self._ran_density += density * tokens
        if density == 1.0:
            self._ran_dense += tokens

    def chosen(
        self, s2: Tensor, experts: ExpertSet, norm_mass: tuple[float, ...] | None = None
    ) -> None:
        """Takes the statistic of all its tokens and the experts it chose, with their norm mass if
        that is known."""
        self.s2, self.experts = s2, experts
        self._mass = None if norm_mass is None else (experts, norm_mass)

    @property
    def norm_mass(self) -> tuple[float, ...]:
        """For each layer the share of its statistic that the experts hold which it runs on; those
        it would run on while it runs dense."""
        experts = (self.view and self.view.experts) or self.experts
        if experts is None or self.s2 is None:
            return () if self._mass is None else self._mass[1]
        if self._mass is None or self._mass[0] is not experts:
            self._mass = experts, experts.norm_mass(self.s2)
        return self._mass[1]

    def figures(self, ff_width: int) -> PruningFigures:
        """What the pruning did so far."""
        return PruningFigures(
            density=self.selection.density,
            policy=self.selection.policy,
            experts_per_layer=self.selection.experts_of(ff_width),
            ff_width=ff_width,
            norm_mass=self.norm_mass,
            slim_view_bytes=self.view_bytes,
            kv_cache_bytes=self.cache.nbytes if self.cache else 0,
            mean_density=self._ran_density / self._ran if self._ran else 0.0,
            dense_tokens=self._ran_dense,
        )

    def info(self, ff_width: int) -> SessionInfo:
        """What others may see of it."""
        now, reserved = time.monotonic(), self.reservation
        return SessionInfo(
            session_id=self.session_id,
            state=self.state,
            context_tokens=len(self.tokens),
            generated_tokens=self.generated_tokens,
            age_s=now - self.opened,
            idle_s=now - self.clock.last_token if self.state is State.IDLE else 0.0,
            reserved_bytes=reserved.kv + reserved.zeroed + (0 if reserved.pool else reserved.view),
            pruning=self.figures(ff_width),
        )
