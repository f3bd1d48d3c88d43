"""How the prompt of each admitted session is read: by this engine, or by its prefill source."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from griffin_core.engine.commands import CommandQueue, HandoffEvent, HandoffFailed
from griffin_core.engine.events import Failed, PrefillBegun, PrefillStreamEvent
from griffin_core.engine.handoff_receiver import HandoffReceiver
from griffin_core.engine.ports import PrefillHandle, PrefillSource
from griffin_core.engine.prefill_queue import PrefillQueue
from griffin_core.engine.prefill_run import PrefillRun
from griffin_core.engine.session import Session
from griffin_core.engine.snapshot import HandoffSnapshot
from griffin_core.engine.task import PrefillTask
from griffin_core.forward.events import (
    LayerActivations,
    PrefillEvent,
)
from griffin_core.forward.prompt import (
    Prompt,
)
from griffin_core.model.decoder import Decoder

log = logging.getLogger(__name__)

Deliver = Callable[[str, PrefillEvent | Exception], None]
"""Gets the id of a turn with an event of its prefill, or with the error that ends it."""


class SessionPrefills:
    """The prefills of an engine's sessions. Owned by the engine's thread, except for ``stop``.

    Args:
        queue: where prompts wait that this engine reads.
        source: reads the other prompts; None if this engine reads all of them.
        local_max_tokens: with a source, this engine reads prompts of new sessions up to this many
            tokens itself; None for all. It always reads the prompts of later turns itself: they are
            short, and the turns before are here.
        commands: brings the source's events to the engine's thread.
    """

    def __init__(
        self,
        decoder: Decoder,
        queue: PrefillQueue,
        *,
        source: PrefillSource | None,
        local_max_tokens: int | None,
        commands: CommandQueue,
    ) -> None:
        self._decoder = decoder
        self._queue = queue
        self._source = source
        self._local_max_tokens = local_max_tokens
        self._commands = commands
        # By the id of the turn, so that no turn of a session reaches into another.
        self._receivers: dict[str, HandoffReceiver] = {}
        self._runs: dict[str, PrefillRun] = {}
        self._handles: dict[str, PrefillHandle] = {}

    def start(self, session: Session, deliver: Deliver) -> None:
        """Begins to read a session's prompt. The session has its cache.

        Args:
            deliver: gets the events if this engine reads the prompt.

        Raises:
            Exception: the source cannot begin.
        """
        self.restart(session)
        later_turn = session.turn_start > 0
        limit = self._local_max_tokens
        short = limit is None or session.prompt_tokens <= limit
        if self._source is None or later_turn or short:
            self._start_here(session, deliver)
        else:
            task = PrefillTask(token_ids=tuple(session.turn_ids), selection=session.selection)
            receiver = _TurnReceiver(session.turn_id, self._commands)
            self._handles[session.turn_id] = self._source.start(
                session.turn_id, task, session.deadline, receiver
            )

    def _start_here(self, session: Session, deliver: Deliver) -> None:
        prompt = partial(
            Prompt,
            self._decoder,
            session.turn_ids,
            session.selection,
            cache=session.cache,
            statistics=session.statistics,
        )
        self._queue_run(session, prompt, session.prompt_tokens, deliver)

    def _queue_run(
        self,
        session: Session,
        make: Callable[[], Prompt],
        tokens: int,
        deliver: Deliver,
        *,
        is_prompt: bool = True,
    ) -> None:
        run = PrefillRun(
            make,
            _TurnSink(session.turn_id, deliver),
            tokens=tokens,
            admitted=True,
            is_prompt=is_prompt,
            owner=session.owner,
        )
        self._runs[session.turn_id] = run
        self._queue.add(run, lambda _: 0.0)  # it is admitted, so it is not refused

    def reread(
        self, session: Session, begin: int, deliver: Deliver, *, checks: bool = False
    ) -> None:
        """Reads the tokens of a session's cache from number ``begin`` on once more.

        Args:
            deliver: gets the events. They are not a handoff.
            checks: whether the head is to read what comes after each token.
        """
        assert session.cache is not None
        end = session.cache.length
        session.cache.rewind(begin)
        prompt = partial(
            Prompt,
            self._decoder,
            session.tokens[begin:end],
            session.selection,
            cache=session.cache,
            statistics=session.statistics,
            tails=session.tails,
            wants_hidden=checks,
        )
        self._queue_run(session, prompt, end - begin, deliver, is_prompt=False)

    def end_reread(self, turn_id: str) -> None:
        """What a turn had read once more is read: it holds nothing of that any longer."""
        self._runs.pop(turn_id, None)

    def restart(self, session: Session) -> None:
        """Forgets what has come of a prompt: it comes anew."""
        assert session.cache is not None
        spec = self._decoder.spec
        self._receivers[session.turn_id] = HandoffReceiver(
            self._decoder,
            session.cache,
            tokens=session.prompt_tokens,
            experts=len(spec.layers) * session.selection.count(spec.intermediate_size),
        )

    def receiver(self, turn_id: str) -> HandoffReceiver | None:
        """What collects the events of a turn's prefill; None if it is over."""
        return self._receivers.get(turn_id)

    def finish(self, turn_id: str) -> None:
        """A turn's prefill is over: nothing further is received for it."""
        del self._receivers[turn_id]
        self._runs.pop(turn_id, None)

    def end(self, turn_id: str) -> None:
        """A turn is over: its prefill ends, wherever it is. Without effect if it never began."""
        self._receivers.pop(turn_id, None)
        if run := self._runs.pop(turn_id, None):
            run.cancel()
            self._queue.drop(run)  # it must not hold the cache, which is freed next
        if handle := self._handles.pop(turn_id, None):
            try:
                handle.cancel()
            except Exception:  # a bug of the source must not keep the session's memory
                log.exception("a prefill cannot be cancelled")

    def stop(self, turn_id: str) -> None:
        """From any thread: this engine is to read no further pass of a turn's prompt."""
        if run := self._runs.get(turn_id):
            run.cancel()

    def snapshot(self) -> tuple[HandoffSnapshot, ...]:
        """What has come of the prompts that are being read."""
        return tuple(
            HandoffSnapshot(turn_id=turn_id, tokens=receiver.tokens, received=receiver.received)
            for turn_id, receiver in self._receivers.items()
        )


@dataclass(frozen=True)
class _TurnReceiver:
    """Brings a source's events to the engine's thread; see ``PrefillReceiver``."""

    turn_id: str
    commands: CommandQueue

    def receive(self, event: PrefillEvent) -> None:
        self.commands.post(HandoffEvent(self.turn_id, event))

    def fail(self, error: Exception) -> None:
        self.commands.post(HandoffFailed(self.turn_id, error))


@dataclass(frozen=True)
class _TurnSink:
    """The sink of a prompt that the engine reads for a session of its own."""

    turn_id: str
    deliver: Deliver

    def put(self, event: PrefillStreamEvent) -> None:
        if isinstance(event, Failed):
            self.deliver(self.turn_id, event.error)
        elif not isinstance(event, PrefillBegun | LayerActivations):  # no session watches any
            self.deliver(self.turn_id, event)

    def ready(self) -> bool:
        return True
