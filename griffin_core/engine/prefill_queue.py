"""Prompts that wait for the model, and the passes in which they are read together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from griffin_core.engine.events import Failed, Sink
from griffin_core.engine.observer import Observer
from griffin_core.engine.snapshot import PrefillsSnapshot
from griffin_core.errors import CapacityExhausted, EngineFault
from griffin_core.experts.selection import Selection
from griffin_core.forward.prefill import (
    MAX_TOGETHER,
    Launch,
    LayerActivations,
    LayerKv,
    Part,
    PrefillEvent,
    Prompt,
    PromptRead,
    launch,
)
from griffin_core.model.decoder import Decoder

log = logging.getLogger(__name__)

MAX_BEGUN_PREFILLS = 4
"""Prefills for other servers under way at once, each with a KV cache that no session's reservation
covers. More than one, so that a reader that lags delays no other prompt, and so that several share
a pass."""

OLDEST_SHARE = 0.5
"""Of a pass, what the prompt that came first may take before shorter ones have their turn. Half:
so a prompt is read at least half as fast as if prompts were read strictly in order of arrival, and
prompts that are shorter than half a chunk in all never wait for a longer one."""


@dataclass(frozen=True, kw_only=True)
class PrefillTask:
    """A prompt to run for a Decode engine, here or elsewhere, or for a caller that studies it.

    Args:
        token_ids: at least one id.
        wants_kv: whether LayerKv events are wanted.
        watch: layers whose activations are wanted.
        most_begun: with how many under way that have a KV cache of their own, itself included, it
            may run.
    """

    token_ids: tuple[int, ...]
    selection: Selection
    wants_kv: bool = True
    watch: frozenset[int] = frozenset()
    most_begun: int = MAX_BEGUN_PREFILLS


@dataclass(frozen=True, kw_only=True)
class PrefillBegun:
    """The first pass with tokens of this prompt begins.

    Args:
        queue_s: seconds it waited.
    """

    queue_s: float


PrefillStreamEvent = PrefillBegun | PrefillEvent | LayerActivations | Failed


class PrefillRun:
    """A prompt in the queue. ``cancel`` may be called from any thread; no event follows the one
    being made.

    Args:
        make: takes its memory when its first pass begins.
        sink: gets PrefillBegun, what ``Prompt`` was asked to tell, the statistic and the experts
            (of an admitted session as PromptExperts, else as a LayerExperts of each layer, on the
            CPU), and PrefillFinished or Failed.
        tokens: T of the prompt.
        admitted: it writes the cache of a session that this engine has admitted.
        most_begun: as in PrefillTask.
    """

    def __init__(
        self,
        make: Callable[[], Prompt],
        sink: Sink[PrefillStreamEvent],
        *,
        tokens: int,
        admitted: bool,
        most_begun: int = MAX_BEGUN_PREFILLS,
    ) -> None:
        self._make = make
        self._tokens = tokens
        self._arrived = time.monotonic()
        self.prompt: Prompt | None = None
        self.sink = sink
        self.admitted = admitted
        self.most_begun = most_begun
        self.cancelled = False

    @property
    def holds_cache(self) -> bool:
        """Whether it has a KV cache of its own."""
        return self.prompt is not None and not self.admitted

    @property
    def left(self) -> int:
        """Tokens still to read."""
        return self._tokens if self.prompt is None else self.prompt.left

    def cancel(self) -> None:
        self.cancelled = True

    def begin(self) -> Prompt:
        """Its prompt, made now if this is its first pass."""
        if self.prompt is None:
            self.tell(PrefillBegun(queue_s=time.monotonic() - self._arrived))
            self.prompt = self._make()
        return self.prompt

    def tell(self, event: PrefillStreamEvent) -> None:
        """Hands its sink an event, unless it was cancelled."""
        if not self.cancelled:
            self.sink.put(event)

    def tell_experts(self, read: PromptRead) -> None:
        """Hands its sink the statistic and the experts."""
        if self.admitted:
            self.tell(read.in_one_piece())
        else:
            for layer in read.by_layer():
                self.tell(layer)


class PrefillQueue:
    """All prefills of an engine, in order of arrival. Owned by the engine's thread.

    A pass takes up to ``chunk_tokens`` tokens of the prompts whose readers keep up. The one that
    came first may take ``OLDEST_SHARE`` of them; then the shortest rest comes first, of equals the
    earlier. So short prompts pass long ones, and none waits for ever: each becomes the first in
    time, and from then on has half of every pass. A pass runs to its end once it has begun, so a
    reader that stops in it gets at most one chunk's events more.

    What a prompt's parts are depends on what it shares passes with, and with them, in the last
    digits, what comes of it. With ``alone`` each pass is one prompt's: the one that came first and
    the shortest rest take turns.

    Args:
        max_waiting: prefills for other servers that may wait behind the one that runs.
        chunk_tokens: most tokens of a pass.
        observer: is told of each prompt that has run.
        alone: no pass reads more than one prompt.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_waiting: int,
        chunk_tokens: int,
        observer: Observer,
        alone: bool = False,
    ) -> None:
        self._decoder = decoder
        self._observer = observer
        self._max_waiting = max_waiting
        self._chunk_tokens = chunk_tokens
        self._alone = alone
        self._oldest_next = True  # with ``alone``
        self._runs: list[PrefillRun] = []
        self.launch: Launch = launch
        """What runs a pass; the engine sets one with graphs where the device has them."""

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

    def drop(self, run: PrefillRun) -> None:
        """Forgets a run that was cancelled, and what it holds. Without effect if it has ended."""
        if run in self._runs:
            self._runs.remove(run)

    def __contains__(self, run: PrefillRun) -> bool:
        """Whether a run waits or is being read."""
        return run in self._runs

    def snapshot(self) -> PrefillsSnapshot:
        """How many prompts wait and are being read."""
        return PrefillsSnapshot(
            queued=len(self._runs),
            begun=sum(run.prompt is not None for run in self._runs),
            holding_cache=sum(run.holds_cache for run in self._runs),
        )

    @property
    def has_work(self) -> bool:
        """Whether ``turn`` would do something."""
        return any(run.cancelled for run in self._runs) or bool(self._able())

    def turn(self) -> None:
        """One pass. Returns when every event of it is out: those of the layers as they were made,
        then the experts of each prompt that came to its end, then PrefillFinished of all of
        them."""
        for cancelled in [run for run in self._runs if run.cancelled]:
            self._runs.remove(cancelled)
        taken = self._begin(self._next_pass())
        if not taken:
            return
        try:
            read = self._read(taken)
        except Exception as error:
            self._decoder.backend.synchronize()  # a lost device raises again: the engine ends
            if len(taken) == 1:
                self._fail(taken[0][0], error)
                return
            log.exception("a pass over %d prompts failed; each is tried alone", len(taken))
            read = []
            for run, part in taken:
                try:
                    read += self._read([(run, part)])
                except Exception as its_own:
                    self._fail(run, its_own)
        self._deliver(read)

    def end(self, error: Exception) -> None:
        """Fails all that are left."""
        for run in self._runs:
            run.sink.put(Failed(error=error))
        self._runs.clear()

    def _able(self) -> list[PrefillRun]:
        """Those that could be in the next pass, in order of arrival."""
        begun = sum(run.holds_cache for run in self._runs)
        able = []
        for run in self._runs:
            begins = not (run.admitted or run.holds_cache)
            if run.cancelled or (begins and begun >= run.most_begun) or not run.sink.ready():
                continue
            begun += begins
            able.append(run)
        return able

    def _next_pass(self) -> list[tuple[PrefillRun, int]]:
        """Who is in the next pass, with how many tokens."""
        able = self._able()
        room = self._chunk_tokens
        if able and self._alone:
            run = able[0] if self._oldest_next else min(able, key=lambda run: run.left)
            self._oldest_next = not self._oldest_next
            return [(run, min(run.left, room))]
        tokens: dict[PrefillRun, int] = {}
        if len(able) > 1:
            tokens[able[0]] = min(able[0].left, max(1, int(room * OLDEST_SHARE)))
            room -= tokens[able[0]]
        for run in sorted(able, key=lambda run: run.left - tokens.get(run, 0)):
            more = min(run.left - tokens.get(run, 0), room)
            if more and (run in tokens or len(tokens) < MAX_TOGETHER):
                tokens[run] = tokens.get(run, 0) + more
                room -= more
        return list(tokens.items())

    def _begin(self, chosen: Sequence[tuple[PrefillRun, int]]) -> list[tuple[PrefillRun, Part]]:
        """Their parts of the pass, without those for which there is no memory."""
        taken = []
        for run, tokens in chosen:
            try:
                taken.append((run, Part(prompt=run.begin(), tokens=tokens)))
            except Exception as error:
                self._fail(run, error)
        return taken

    def _read(
        self, taken: Sequence[tuple[PrefillRun, Part]]
    ) -> list[tuple[PrefillRun, PromptRead]]:
        """Runs the pass; those that came to their end, and what came of them."""
        runs = {id(part.prompt): run for run, part in taken}

        def tell(prompt: Prompt, event: LayerKv | LayerActivations) -> None:
            runs[id(prompt)].tell(event)

        read = self.launch(self._decoder, [part for _, part in taken], tell).end()
        return [(runs[id(each.prompt)], each) for each in read]

    def _deliver(self, read: Sequence[tuple[PrefillRun, PromptRead]]) -> None:
        finished = []
        for run, each in read:
            self._runs.remove(run)
            finished.append((run, each if run.admitted else each.on_host()))
        for run, each in finished:
            run.tell_experts(each)
        for run, each in finished:
            run.tell(each.finished)
            self._observer.prefilled(each.finished)

    def _fail(self, run: PrefillRun, error: Exception) -> None:
        log.error("prefill failed", exc_info=error)
        self._runs.remove(run)
        run.tell(Failed(error=EngineFault(f"{type(error).__name__}: {error}")))
