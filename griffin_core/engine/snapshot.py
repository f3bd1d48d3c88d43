"""What an engine holds at one moment, for diagnosis and for tests.

A snapshot is taken in the engine's thread between two steps, so that all parts of it belong
together. It is plain data: changing it changes nothing in the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from griffin_core.experts.slim_spec import SlimSpec

if TYPE_CHECKING:  # the session module imports rooms that offer snapshots of themselves
    from griffin_core.engine.session import State

RunForm = Literal["dense", "own", "shared", "zeroed"]
"""What a session runs on: all neurons, a slim view of its own experts, the slim view of its group,
or all weights with the activations outside its experts set to zero."""


@dataclass(frozen=True, kw_only=True)
class CacheSnapshot:
    """A session's KV cache.

    Args:
        tokens: how many tokens it holds.
        capacity: how many tokens it has room for.
        nbytes: bytes of its memory.
    """

    tokens: int
    capacity: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class SessionSnapshot:
    """A session and its current turn.

    Args:
        session_id: known to the client.
        turn_id: id of its current turn, or of its last one.
        state: where it is in its life.
        slot: its slot in the sampler; None while it draws no tokens.
        in_flight: tokens that the device draws and the host has not read yet.
        stalled: whether it waits for a reader that lags.
        in_turn: whether it holds anything of a turn.
        turn_generated: tokens that were generated in the turn.
        total_tokens: tokens of all turns.
        cache: its KV cache; None before it is admitted.
        reserved_kv_bytes: the most its KV cache, and a kept session's statistic, can come to hold.
        view_bytes: bytes it holds beyond the model's own weights to run on its experts.
        view: an opaque number of what its next step runs on. Sessions of one snapshot with equal
            numbers run on the same object. None before it runs on anything.
        form: what its next step runs on; None before it runs on anything.
        runs_on: the experts of its next step; None for all neurons, or for no view.
        slim: the experts that its own statistic chose; None between turns.
        tokens: ids of all its tokens; None unless the snapshot was asked for contents.
        statistic: a copy of its squared statistic [L, F] float32; None if it has none, or if the
            snapshot was not asked for contents.
    """

    session_id: str
    turn_id: str
    state: State
    slot: int | None
    in_flight: int
    stalled: bool
    in_turn: bool
    turn_generated: int
    total_tokens: int
    cache: CacheSnapshot | None
    reserved_kv_bytes: int
    view_bytes: int
    view: int | None
    form: RunForm | None
    runs_on: SlimSpec | None
    slim: SlimSpec | None
    tokens: tuple[int, ...] | None
    statistic: Tensor | None


@dataclass(frozen=True, kw_only=True)
class SchedulerSnapshot:
    """Ids of the sessions by where the scheduler has them, and its sums.

    Args:
        live: sessions in prefill or decode.
        waiting: sessions in the queue, in order of arrival.
        idle: kept sessions between turns, the longest idle first.
        recalled: kept sessions whose next turn waits; they are among ``waiting`` too.
        idle_bytes: bytes that the sessions of ``idle`` have reserved.
        recalled_bytes: bytes that the sessions of ``recalled`` have reserved for what they hold.
        turn_s: smoothed seconds of a turn; None before one has ended.
    """

    live: tuple[str, ...]
    waiting: tuple[str, ...]
    idle: tuple[str, ...]
    recalled: tuple[str, ...]
    idle_bytes: int
    recalled_bytes: int
    turn_s: float | None


@dataclass(frozen=True, kw_only=True)
class HandoffSnapshot:
    """A prompt that is being read for a session, here or elsewhere.

    Args:
        turn_id: the turn that it is for.
        tokens: T, tokens of the prompt.
        received: for each layer, the tokens whose KV has been handed over. They stay 0 where this
            engine reads the prompt itself: that KV is written into the session's cache.
    """

    turn_id: str
    tokens: int
    received: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PrefillsSnapshot:
    """The prompts that this engine reads, for itself and for others.

    Args:
        queued: prompts in the queue, those that are being read included.
        begun: prompts of these whose first pass has begun.
        owning_cache: prompts of these that have a KV cache of their own.
    """

    queued: int
    begun: int
    owning_cache: int


@dataclass(frozen=True, kw_only=True)
class ViewSnapshot:
    """A slim view.

    Args:
        users: sessions and groups that hold it; 0 if it is only kept while there is room.
        nbytes: the most bytes it holds beyond the model's own weights.
        ready: whether all layers can run.
        pending: layers that are still to be built, or built anew.
    """

    users: int
    nbytes: int
    ready: bool
    pending: int


@dataclass(frozen=True, kw_only=True)
class GroupSnapshot:
    """Sessions that run on one expert set.

    Args:
        density, policy: what its members have in common.
        members: their session ids.
    """

    density: float
    policy: str
    members: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GroupsSnapshot:
    """What the sessions run on.

    Args:
        sessions: ids of all sessions that have experts to run on, in groups or alone.
        shared: the groups.
        due: whether something is to be done before the next step: a choice, a view to build, or a
            failure to report.
    """

    sessions: tuple[str, ...]
    shared: tuple[GroupSnapshot, ...]
    due: bool


@dataclass(frozen=True, kw_only=True)
class BytesSnapshot:
    """Bytes of KV caches and slim views.

    Args:
        limit: what may be held.
        idle_limit: what kept sessions may hold of it between turns.
        held: what is held now.
        peak: the most that was ever held.
        views: what slim views hold of it, with what lets sessions run zeroed.
    """

    limit: int
    idle_limit: int
    held: int
    peak: int
    views: int


@dataclass(frozen=True, kw_only=True)
class EngineSnapshot:
    """Everything that an engine holds at one moment.

    Args:
        sessions: all sessions, oldest first.
        turns: for each turn that has not ended, by its id, the id of its session.
        scheduler: which sessions run, wait and rest.
        handoffs: prompts that are being read for sessions.
        prefills: prompts that this engine reads.
        views: all slim views, used or not.
        groups: what the sessions run on.
        free_slots: slots of the sampler that belong to no session.
        slots_in_use: slots of the sampler that hold something of a request: some of those of
            sessions, and no free one. A plain greedy request leaves nothing in its slot.
        nbytes: bytes of caches and views.
        next_due_s: seconds until something becomes due by itself; None if nothing will.
    """

    sessions: tuple[SessionSnapshot, ...]
    turns: Mapping[str, str]
    scheduler: SchedulerSnapshot
    handoffs: tuple[HandoffSnapshot, ...]
    prefills: PrefillsSnapshot
    views: tuple[ViewSnapshot, ...]
    groups: GroupsSnapshot
    free_slots: tuple[int, ...]
    slots_in_use: frozenset[int]
    nbytes: BytesSnapshot
    next_due_s: float | None

    def session(self, session_id: str) -> SessionSnapshot | None:
        """The session of an id; None if there is none."""
        return next((each for each in self.sessions if each.session_id == session_id), None)
