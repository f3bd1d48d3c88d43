"""A session: everything one conversation owns in Decode, and what frees it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol, get_args

from torch import Tensor

from griffin_core.decode.events import Event, PruningFigures, Sink
from griffin_core.experts.expert_set import ExpertSet
from griffin_core.experts.selection import PolicyName, Selection
from griffin_core.kv_cache import KvCache
from griffin_core.model.linear import Rows
from griffin_core.slim.views import SlimView

Sharing = Literal["private", "shared", "auto"]
"""Whether a session may run on one expert set with others: never, with all that may, or as soon as
private sets cost more than they save."""
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)


class State(Enum):
    """Where a session is in its life."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    IDLE = "idle"


@dataclass(frozen=True, kw_only=True)
class ViewPool:
    """Sessions that may share expert sets reserve their slim views together.

    Args:
        density, policy: what they have in common.
        most_views: they never hold more than this, however many they are.
    """

    density: float
    policy: PolicyName
    most_views: int


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """The most bytes a session can come to hold.

    Args:
        kv: of its KV cache.
        view: of a slim view.
        pool: with whom it shares views; None if its view is its own.
    """

    kv: int
    view: int = 0
    pool: ViewPool | None = None


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """A session as others may see it.

    Args:
        reserved_bytes: the most its KV cache, and its slim view if that is its own, can come to
            hold.
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
    into the session's sink."""

    rows: Rows
    """How many tokens it mostly runs at once."""

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
        self.turn_id = ""
        self.opened = time.monotonic()
        self.state = State.QUEUED
        self.tokens: list[int] = []
        """All tokens of all turns; the cache may lack the last ones."""
        self.generated_tokens = 0
        self.slot: int | None = None
        """Of the sampler, while it generates."""
        self.in_flight = 0
        """Tokens that the device draws and the host has not read yet."""
        self.reservation = Reservation(kv=0)
        self.cache: KvCache | None = None
        self.s2: Tensor | None = None
        self.experts: ExpertSet | None = None
        """What its own statistic chose; in a group it may run on others."""
        self.view: SlimView | None = None
        """What it runs on; None while that is being built. Its expert group owns it."""
        self.norm_mass: tuple[float, ...] = ()

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
        self.turn_generated = 0
        self.in_flight = 0
        self.capacity = capacity
        self.selection = selection
        self.sharing = sharing
        self.work = work
        self.sink = sink
        self.keep = keep

    def use(self, view: SlimView | None) -> None:
        """Runs on a view from now on, or waits for one."""
        self.view = view
        if view is not None:
            assert self.s2 is not None
            self.norm_mass = view.experts.norm_mass(self.s2)
            self.clock.view_ready = self.clock.view_ready or time.monotonic()

    @property
    def prompt_tokens(self) -> int:
        """Tokens prefilled for the current turn."""
        return len(self.tokens) - self.turn_start - self.turn_generated

    def figures(self, ff_width: int) -> PruningFigures:
        """What the pruning did so far."""
        return PruningFigures(
            density=self.selection.density,
            policy=self.selection.policy,
            experts_per_layer=self.selection.experts_of(ff_width),
            ff_width=ff_width,
            norm_mass=self.norm_mass,
            slim_view_bytes=self.view.nbytes if self.view else 0,
            kv_cache_bytes=self.cache.nbytes if self.cache else 0,
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
            reserved_bytes=reserved.kv + (0 if reserved.pool else reserved.view),
            pruning=self.figures(ff_width),
        )
