"""Prompts that wait for the model, and the passes in which they are read together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import count, zip_longest

from griffin_core.engine.events import Failed
from griffin_core.engine.ports import Observer
from griffin_core.engine.prefill_run import PrefillRun
from griffin_core.engine.snapshot import PrefillsSnapshot
from griffin_core.errors import CapacityExhausted, EngineFault
from griffin_core.forward.events import (
    LayerActivations,
    LayerKv,
)
from griffin_core.forward.prefill import MAX_TOGETHER, Launch, launch
from griffin_core.forward.prompt import (
    Part,
    Prompt,
)
from griffin_core.forward.prompt_pass import PromptRead
from griffin_core.model.decoder import Decoder

log = logging.getLogger(__name__)

OLDEST_SHARE = 0.5
"""Share of a pass that the prompt that came first may take before shorter ones have their turn.
With one half, every prompt is read at least half as fast as if prompts were read strictly in order
of arrival, and prompts that together are shorter than half a chunk never wait for a longer one."""


class PrefillQueue:
    """All prefills of an engine, in order of arrival, their owners by turns. Owned by the engine's
    thread.

    A pass takes up to ``chunk_tokens`` tokens of the prompts whose readers keep up. The prompt that
    is first may take ``OLDEST_SHARE`` of them. Then the prompt with the fewest tokens left comes
    first; of two with equally many, the earlier one. So short prompts overtake long ones, and none
    waits for ever: in time each becomes the first, and from then on has half of every pass. A pass
    runs to its end once it has begun, so a reader that stops during it gets at most one more
    chunk's events.

    How a prompt is divided into passes depends on the other prompts, and in the last digits its
    results depend on how it is divided. With ``alone`` each pass is for one prompt: the one that
    came first and the one with the fewest tokens left take turns.

    Args:
        max_waiting: prefills for other servers that may wait besides the one that runs.
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
        self._numbers = count(1)
        self._turns: dict[str, int] = {}  # when each owner's last run began; 0 for one without any
        self.added = 0
        """The number of prefills that were queued since the engine began."""
        self.launch: Launch = launch
        """What runs a pass; the engine sets one with graphs where the device has them."""

    def add(self, run: PrefillRun, retry_after_s: Callable[[str], float]) -> None:
        """Queues a prefill, or tells its sink that there is no room.

        Args:
            retry_after_s: gives the seconds until a refused prefill of an owner may come again.
        """
        waiting = [other for other in self._runs if not other.cancelled]
        own = sum(other.owner == run.owner for other in waiting)
        full = len(waiting) > self._max_waiting
        others = any(other.owner != run.owner for other in waiting)
        if not run.admitted and (full or (others and own > self._max_waiting // 2)):
            message = f"queue: {len(waiting)} prefills wait already"
            message += ", the most this server allows" if full else f", {own} of them yours"
            error = CapacityExhausted(message, retry_after_s=retry_after_s(run.owner))
            run.sink.put(Failed(error=error))
        else:
            self._runs.append(run)
            self.added += 1

    def drop(self, run: PrefillRun) -> None:
        """Removes a run that was cancelled, with the memory it holds. Without effect if it has
        ended."""
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
            owning_cache=sum(run.owns_cache for run in self._runs),
        )

    @property
    def has_work(self) -> bool:
        """Whether ``run_pass`` would do something."""
        return any(run.cancelled for run in self._runs) or bool(self._able())

    @property
    def has_room(self) -> bool:
        """Whether the next pass could take another prompt."""
        able = self._able()
        tokens = sum(run.left for run in able)
        return tokens < self._chunk_tokens and len(able) < MAX_TOGETHER and not self._alone

    def run_pass(self) -> None:
        """Runs one pass. Returns when every event of it is out: those of the layers as they were
        made, then the experts of each prompt that was read to its end, then PrefillFinished of all
        these prompts."""
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
                except Exception as own_error:
                    self._fail(run, own_error)
        self._deliver(read)

    def end(self, error: Exception) -> None:
        """Fails all prefills that are left."""
        for run in self._runs:
            run.sink.put(Failed(error=error))
        self._runs.clear()

    def _able(self) -> list[PrefillRun]:
        """The runs that could be in the next pass. Those of one owner are in order of arrival, and
        the owners take turns."""
        concurrent = sum(run.owns_cache for run in self._runs)
        able = []
        for run in self._in_turn():
            begins = not (run.admitted or run.owns_cache)
            full = begins and concurrent >= run.max_concurrent
            if run.cancelled or full or not run.sink.ready():
                continue
            concurrent += begins
            able.append(run)
        return able

    def _in_turn(self) -> Iterator[PrefillRun]:
        """All runs: the first one of each owner, then the second ones, the owner first whose last
        turn is the longest ago."""
        by_owner: dict[str, list[PrefillRun]] = {}
        for run in self._runs:
            by_owner.setdefault(run.owner, []).append(run)
        self._turns = {owner: self._turns.get(owner, 0) for owner in by_owner}
        queues = sorted(by_owner, key=self._turns.__getitem__)
        for row in zip_longest(*map(by_owner.__getitem__, queues)):
            yield from (run for run in row if run is not None)

    def _next_pass(self) -> list[tuple[PrefillRun, int]]:
        """The runs of the next pass, each with its number of tokens."""
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
        """The runs' parts of the pass, without runs for which there is no memory."""
        taken = []
        for run, tokens in chosen:
            if run.prompt is None:
                self._turns[run.owner] = next(self._numbers)
            try:
                taken.append((run, Part(prompt=run.begin(), tokens=tokens)))
            except Exception as error:
                self._fail(run, error)
        return taken

    def _read(
        self, taken: Sequence[tuple[PrefillRun, Part]]
    ) -> list[tuple[PrefillRun, PromptRead]]:
        """Runs the pass. Returns the runs that were read to their end, with their results."""
        runs = {id(part.prompt): run for run, part in taken}

        def tell(prompt: Prompt, event: LayerKv | LayerActivations) -> None:
            runs[id(prompt)].tell(event)

        read = self.launch(self._decoder, [part for _, part in taken], tell).end()
        return [(runs[id(each.prompt)], each) for each in read]

    def _deliver(self, read: Sequence[tuple[PrefillRun, PromptRead]]) -> None:
        # All of it before a prompt leaves the queue, since a lost device fails here.
        finished = []
        for run, each in read:
            try:
                finished.append((run, each if run.admitted else each.corrected().on_host()))
            except Exception as error:
                self._decoder.backend.synchronize()  # a lost device raises again: the engine ends
                self._fail(run, error)
        for run, _ in finished:
            self._runs.remove(run)
        for run, each in finished:
            run.tell_experts(each)
        for run, each in finished:
            run.tell(each.finished)
            if run.is_prompt:
                self._observer.prefilled(each.finished)

    def _fail(self, run: PrefillRun, error: Exception) -> None:
        log.error("prefill failed", exc_info=error)
        self._runs.remove(run)
        run.tell(Failed(error=EngineFault.of(error)))
