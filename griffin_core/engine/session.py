"""A session: everything that one conversation owns in Decode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from griffin_core.engine.density_control import DensityControl
from griffin_core.engine.events import Event, PruningFigures
from griffin_core.engine.ports import Sink
from griffin_core.engine.reservation import Reservation
from griffin_core.engine.turn import TurnPlan
from griffin_core.experts.correction import Correction
from griffin_core.experts.correction_fit import Tail
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics
from griffin_core.forward.events import PromptExperts
from griffin_core.kv.cache import KvCache
from griffin_core.slim.base import RunView
from griffin_core.spec.choices import CorrectionKind
from griffin_core.spec.model import ModelSpec


class State(Enum):
    """Where a session is in its life."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    IDLE = "idle"


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """A session as callers may see it.

    Args:
        reserved_bytes: the most that its KV cache, what lets it run zeroed, and its slim view if
            that is its own, can come to hold.
    """

    session_id: str
    owner: str
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
        last: what the page after this one begins after; None if this is the last page.
        total: number of sessions in all.
    """

    sessions: Sequence[SessionInfo]
    last: int | None
    total: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the sessions of an engine hold.

    Args:
        sessions: number of sessions in each state.
        limit_bytes: the most that views and caches may hold together.
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
    """Since when its reader has lagged; 0 if it keeps up."""
    selection_s: float = 0.0


class Session:
    """One conversation's KV cache, statistic, experts and slim view, and its current turn.

    The engine's thread owns it. ``Sessions`` begins, keeps and frees it.

    Args:
        session_id: known to the client.
        owner: who alone may continue it; empty where callers are not told apart.
        shares_with: sessions of one value may run on one expert set: the owner, or empty where
            owners share.
    """

    def __init__(self, session_id: str, *, owner: str = "", shares_with: str = "") -> None:
        self.session_id = session_id
        self.owner = owner
        self.shares_with = shares_with
        self.number = 0
        """Sessions are numbered from 1 in the order in which they were first queued."""
        self.overtaken = 0
        """How often others have begun before it while it waited for memory."""
        self.turn_id = ""
        self.opened = time.monotonic()
        self.state = State.QUEUED
        self.tokens: list[int] = []
        """All tokens of all turns, except those after a stop string. The cache may lack the last
        ones."""
        self.generated_tokens = 0
        self.slot: int | None = None
        """The sampler's slot, while it generates."""
        self.in_flight = 0
        """Tokens that the device draws and the host has not read yet."""
        self.reservation = Reservation(kv=0)
        self.cache: KvCache | None = None
        self.statistics: Statistics | None = None
        """The statistics of all its tokens."""
        self.slim: SlimSpec | None = None
        """What its own statistics chose; in a group it may run on others. None between turns."""
        self.tails: Sequence[Sequence[Tail]] = ()
        """What the residual of its experts is to be fitted to, from its prompt until it joins
        ``ExpertGroups``."""
        self.control: DensityControl | None = None
        self.in_dense_pass = False
        """Whether a dense pass over its last tokens waits or runs; no step may then."""
        self.checks = False
        self.check_at = 0
        """The length of its cache at which the next check is due; 0 before it runs slim steps."""
        self.uncounted_from = 0
        """From which of its tokens on a dense pass may add them to its statistics."""
        self.pass_read: PromptExperts | None = None
        """What a dense pass has read, until it has finished."""
        self.expert_counts: tuple[int, ...] = ()
        """K of each layer, once they are chosen."""
        self.view: RunView | None = None
        """What its next step runs on; None before it has joined ``ExpertGroups``, which owns it."""
        self.view_bytes = 0
        """What it holds beyond the model's own weights to run on its experts."""
        self._mass: tuple[SlimSpec | None, tuple[float, ...]] | None = None

    def begin_turn(self, plan: TurnPlan, sink: Sink[Event]) -> None:
        """Sets a turn up; ``sink`` is where its events go."""
        self.turn_id = plan.turn_id
        self.clock = Clock(arrived=plan.arrived)
        self.deadline = plan.deadline
        self.turn_start = self.cache.length if self.cache else 0
        self.tokens += plan.prompt
        self.prompt_tokens = len(self.tokens) - self.turn_start
        """Tokens to prefill in this turn."""
        self.turn_generated = 0
        self.in_flight = 0
        self.in_dense_pass, self.pass_read = False, None
        self.uncounted_from = len(self.tokens)
        self.checks = plan.checks
        self.control = plan.control
        self.check_at = 0
        self._checked = self._agreed = 0
        self._ran = 0
        self._ran_dense = 0
        self._ran_density = 0.0
        self.capacity = plan.capacity
        self.selection = plan.selection
        self.asked = plan.asked
        self.sharing = plan.sharing
        self.turn = plan.turn
        self.keep = plan.keep
        self.sink = sink

    def end_turn(self) -> None:
        """Its turn is over and it is kept: from now on it holds its tokens, its cache and its
        statistic, and nothing that the next turn makes anew. An engine may keep tens of
        thousands."""
        self._mass = None, self.norm_mass
        self.slim = None
        self.tails = ()
        self.pass_read = None
        del self.turn, self.sink

    @property
    def in_turn(self) -> bool:
        """Whether it holds anything of a turn."""
        return hasattr(self, "turn") or hasattr(self, "sink")

    @property
    def turn_ids(self) -> list[int]:
        """The tokens to prefill in this turn."""
        return self.tokens[self.turn_start :]

    @property
    def cache_length(self) -> int:
        """The number of its tokens that have run."""
        return self.cache.length if self.cache else 0

    def note_check(self, tokens: int, agreed: int) -> None:
        """Notes how many tokens were checked, and how many of them the dense model draws too."""
        self._checked += tokens
        self._agreed += agreed

    @property
    def density(self) -> float:
        """The share of the FF neurons that its next step runs on."""
        slim = None if self.view is None else self.view.slim
        return 1.0 if slim is None else slim.density

    def ran(self, density: float, tokens: int = 1) -> None:
        """Notes how tokens of the turn were made.

        Args:
            density: of the step that made them, taken when the step began. A turn's first token
                comes from its prompt, which runs dense.
        """
        self._ran += tokens
        self._ran_density += density * tokens
        if density == 1.0:
            self._ran_dense += tokens

    def chosen(
        self,
        statistics: Statistics,
        slim: SlimSpec,
        norm_mass: tuple[float, ...] | None = None,
        tails: Sequence[Sequence[Tail]] = (),
    ) -> None:
        """Takes the statistics of all its tokens and the experts that they chose, with their norm
        mass if that is known.

        Args:
            tails: see ``Session.tails``.
        """
        self.statistics, self.slim, self.tails = statistics, slim, tails
        self.expert_counts = slim.counts
        self._mass = None if norm_mass is None else (slim, norm_mass)

    def counted(self, statistics: Statistics) -> None:
        """Takes the statistics of more of its tokens; its experts stay."""
        self.statistics, self._mass = statistics, None

    @property
    def norm_mass(self) -> tuple[float, ...]:
        """For each layer the share of its statistic that is in the experts it runs on; while it
        runs dense, in those that it would run on."""
        slim = (self.view and self.view.slim) or self.slim
        if slim is None or self.statistics is None:
            return () if self._mass is None else self._mass[1]
        if self._mass is None or self._mass[0] is not slim:
            self._mass = slim, slim.norm_mass(self.statistics.s2)
        return self._mass[1]

    def pruning_stats(self, spec: ModelSpec) -> PruningFigures:
        """What the pruning did so far."""
        return PruningFigures(
            density=self.selection.density,
            policy=self.selection.policy,
            expert_counts=self.expert_counts or self._uniform_counts(spec),
            correction=self.correction_kind,
            correction_rank=self.correction.rank if self.correction else 0,
            correction_bytes=self.correction.nbytes if self.correction else 0,
            ff_width=spec.intermediate_size,
            norm_mass=self.norm_mass,
            slim_view_bytes=self.view_bytes,
            kv_cache_bytes=self.cache.nbytes if self.cache else 0,
            mean_density=self._ran_density / self._ran if self._ran else 0.0,
            dense_tokens=self._ran_dense,
            checked_tokens=self._checked,
            agreed_tokens=self._agreed,
            agreement_floor=None if self.control is None else self.control.floor,
        )

    @property
    def correction(self) -> Correction | None:
        """What is added to the output of the experts that it runs on."""
        chooses = self.in_turn and self.turn.chooses
        slim = self.slim if self.view is None or chooses else self.view.slim
        return None if slim is None else slim.correction

    @property
    def correction_kind(self) -> CorrectionKind:
        """The kind of its correction; a prompt may be too short for the one asked for."""
        if self.correction is None:
            return "none"
        return "residual" if self.correction.rank else "bias"

    def _uniform_counts(self, spec: ModelSpec) -> tuple[int, ...]:
        return (self.selection.count(spec.intermediate_size),) * len(spec.layers)

    def info(self, spec: ModelSpec) -> SessionInfo:
        """What callers may see of it."""
        now = time.monotonic()
        return SessionInfo(
            session_id=self.session_id,
            owner=self.owner,
            state=self.state,
            context_tokens=len(self.tokens),
            generated_tokens=self.generated_tokens,
            age_s=now - self.opened,
            idle_s=now - self.clock.last_token if self.state is State.IDLE else 0.0,
            reserved_bytes=self.reservation.own,
            pruning=self.pruning_stats(spec),
        )
