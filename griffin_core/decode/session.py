"""A session: everything one conversation owns in Decode, and what frees it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from griffin_core.decode.events import Event, PruningFigures, Sink
from griffin_core.experts.expert_set import ExpertSet
from griffin_core.experts.selection import Selection
from griffin_core.kv_cache import KvCache
from griffin_core.slim.base import SlimView


class State(Enum):
    """Where a session is in its life."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    IDLE = "idle"


@dataclass
class Clock:
    """When things happened to the current turn, on ``time.monotonic``; 0 for not yet."""

    arrived: float = 0.0
    admitted: float = 0.0
    prefilled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    selection_s: float = 0.0
    slim_build_s: float = 0.0


class Work(Protocol):
    """What a session does once its prompt is read: generate, or score."""

    def begin(self, session: Session, last_hidden: Tensor) -> None:
        """Takes the final hidden state [D] of the prompt's last token."""
        ...

    def step(self, session: Session) -> bool:
        """One engine step. Puts events into the session's sink; True when done."""
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
        self.needed_bytes = 0
        self.reserved_bytes = 0
        self.cache: KvCache | None = None
        self.s2: Tensor | None = None
        self.experts: ExpertSet | None = None
        self.view: SlimView | None = None
        self.norm_mass: tuple[float, ...] = ()

    def begin_turn(
        self,
        turn_id: str,
        *,
        arrived: float,
        prompt: Sequence[int],
        capacity: int,
        selection: Selection,
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
            keep: stay idle for a next turn when done.
        """
        self.turn_id = turn_id
        self.clock = Clock(arrived=arrived)
        self.turn_start = self.cache.length if self.cache else 0
        self.tokens += prompt
        self.turn_generated = 0
        self.capacity = capacity
        self.selection = selection
        self.work = work
        self.sink = sink
        self.keep = keep

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
