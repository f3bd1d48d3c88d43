"""Prompts that wait for the model, and the turns they get."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from griffin_core.decode.events import Failed, Sink
from griffin_core.errors import CapacityExhausted, EngineFault
from griffin_core.experts.selection import Selection
from griffin_core.observer import Observer
from griffin_core.prefill import LayerActivations, PrefillEvent, PrefillFinished

log = logging.getLogger(__name__)

MAX_BEGUN_PREFILLS = 4
"""Prefills for other servers under way at once, each with a KV cache that no session's reservation
covers. More than one, so that a reader that lags holds up nobody else."""


@dataclass(frozen=True, kw_only=True)
class PrefillTask:
    """A prompt to run for a Decode engine, here or elsewhere, or for whoever studies it.

    Args:
        token_ids: at least one id.
        watch: layers whose activations are wanted.
        most_begun: with how many under way that have a KV cache of their own, itself included, it
            may run.
    """

    token_ids: tuple[int, ...]
    selection: Selection
    watch: frozenset[int] = frozenset()
    most_begun: int = MAX_BEGUN_PREFILLS


@dataclass(frozen=True, kw_only=True)
class PrefillBegun:
    """The model is this prefill's now.

    Args:
        queue_s: seconds it waited.
    """

    queue_s: float


PrefillStep = PrefillEvent | LayerActivations | None
"""What ``prefill`` yields."""

PrefillStreamEvent = PrefillBegun | PrefillEvent | LayerActivations | Failed


class PrefillRun:
    """A prefill in the engine. ``cancel`` may be called from any thread; no event follows the one
    being made.

    Args:
        events: begins it.
        admitted: it writes the cache of a session that this engine has admitted.
        most_begun: as in PrefillTask.
    """

    def __init__(
        self,
        events: Callable[[], Iterator[PrefillStep]],
        sink: Sink[PrefillStreamEvent],
        *,
        admitted: bool,
        most_begun: int = MAX_BEGUN_PREFILLS,
    ) -> None:
        self._make_events = events
        self._events: Iterator[PrefillStep] | None = None
        self._arrived = time.monotonic()
        self.sink = sink
        self.admitted = admitted
        self.most_begun = most_begun
        self.cancelled = False

    @property
    def holds_cache(self) -> bool:
        """Whether it has a KV cache of its own."""
        return self._events is not None and not self.admitted

    def cancel(self) -> None:
        self.cancelled = True

    def turn(self, observer: Observer) -> bool:
        """Runs to the end of a chunk, or until the sink is full. True when there is no more."""
        if self._events is None:
            self.sink.put(PrefillBegun(queue_s=time.monotonic() - self._arrived))
            self._events = self._make_events()
        for event in self._events:
            if self.cancelled:
                return True
            if event is None:
                return False
            self.sink.put(event)
            if isinstance(event, PrefillFinished):
                observer.prefilled(event)
                return True
            if not self.sink.ready():
                return False
        return True


class PrefillQueue:
    """All prefills of an engine, in order of arrival. Owned by the engine's thread.

    Args:
        max_waiting: prefills for other servers that may wait behind the one that runs.
        observer: is told of each prompt that has run.
    """

    def __init__(self, max_waiting: int, observer: Observer) -> None:
        self._observer = observer
        self._max_waiting = max_waiting
        self._runs: deque[PrefillRun] = deque()

    def add(self, run: PrefillRun, retry_after_s: float) -> None:
        """Queues a prefill, or tells its sink that there is no room.

        Args:
            retry_after_s: when to come back.
        """
        waiting = sum(not other.cancelled for other in self._runs)
        if not run.admitted and waiting > self._max_waiting:
            words = f"queue: {waiting} prefills wait already, the most this server allows"
            run.sink.put(Failed(error=CapacityExhausted(words, retry_after_s=retry_after_s)))
        else:
            self._runs.append(run)

    @property
    def has_work(self) -> bool:
        """Whether ``turn`` would do something."""
        return any(run.cancelled for run in self._runs) or self._next() is not None

    def turn(self) -> None:
        """One chunk of the first prefill whose reader keeps up."""
        for cancelled in [run for run in self._runs if run.cancelled]:
            self._runs.remove(cancelled)
        run = self._next()
        if run is None:
            return
        try:
            done = run.turn(self._observer)
        except Exception as error:
            log.exception("prefill failed")
            run.sink.put(Failed(error=EngineFault(f"{type(error).__name__}: {error}")))
            done = True
        if done:
            self._runs.remove(run)

    def end(self, error: Exception) -> None:
        """Fails all that are left."""
        for run in self._runs:
            run.sink.put(Failed(error=error))
        self._runs.clear()

    def _next(self) -> PrefillRun | None:
        begun = sum(run.holds_cache for run in self._runs)
        for run in self._runs:
            may_begin = run.admitted or run.holds_cache or begun < run.most_begun
            if may_begin and run.sink.ready():
                return run
        return None
