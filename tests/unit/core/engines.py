"""Driving an engine without a server."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Failed, Finished, PrefillBegun, Scored, TokensMade
from griffin_core.engine.ports import PrefillReceiver
from griffin_core.engine.prefill_run import PrefillRun
from griffin_core.engine.task import GenerateTask, PrefillTask, ScoreTask
from griffin_core.forward.events import (
    PrefillFinished,
)
from griffin_core.model.load import Model


class Inbox:
    """A sink that keeps what it gets; ``open`` says whether it is ready."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.open = True

    def put(self, event: Any) -> None:
        self.events.put(event)

    def ready(self) -> bool:
        return self.open

    def get(self) -> Any:
        return self.events.get(timeout=30)

    def until(self, *kinds: type) -> Any:
        """The next event of these kinds, or of Failed."""
        while not isinstance(event := self.get(), (*kinds, Failed)):
            pass
        return event


class Loopback:
    """A prefill source that reads prompts on an engine, as a prefill server would: by default on
    the one that it serves."""

    def __init__(self, reader: Engine | None = None) -> None:
        self.reader = reader
        self.begun: dict[str, PrefillRun] = {}
        """The prefills that were begun, by turn id."""

    def start(
        self, turn_id: str, task: PrefillTask, deadline: float | None, receiver: PrefillReceiver
    ) -> PrefillRun:
        assert self.reader is not None
        self.begun[turn_id] = self.reader.prefill(task, Forwarded(receiver))
        return self.begun[turn_id]


class Forwarded:
    """A sink that hands a prefill's events to a turn."""

    def __init__(self, receiver: PrefillReceiver) -> None:
        self.receiver = receiver

    def put(self, event: Any) -> None:
        if isinstance(event, Failed):
            self.receiver.fail(event.error)
        elif not isinstance(event, PrefillBegun):
            self.receiver.receive(event)

    def ready(self) -> bool:
        return True


class Begun:
    """A prefill that a test brings by hand."""

    def __init__(
        self, turn_id: str, task: PrefillTask, deadline: float | None, receiver: PrefillReceiver
    ) -> None:
        self.turn_id = turn_id
        self.task = task
        self.deadline = deadline
        self.receiver = receiver
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        assert not self.cancelled.is_set(), "it was cancelled before"
        self.cancelled.set()


class ByHand:
    """A prefill source that keeps what it was asked for, and does nothing."""

    def __init__(self) -> None:
        self._begun: queue.Queue[Begun] = queue.Queue()

    def start(
        self, turn_id: str, task: PrefillTask, deadline: float | None, receiver: PrefillReceiver
    ) -> Begun:
        begun = Begun(turn_id, task, deadline, receiver)
        self._begun.put(begun)
        return begun

    def next(self) -> Begun:
        """The next prefill that was asked for."""
        return self._begun.get(timeout=30)


@contextlib.contextmanager
def engine(model: Model, **options: Any) -> Iterator[Engine]:
    """Runs an engine that has every prompt handed over, unless told otherwise. By default sessions
    are private, so that what one makes does not depend on the others, and the engine runs on one
    thread, however many another engine of this process has left set."""
    source = Loopback()
    defaults = {"prefill_source": source, "local_prefill_max_tokens": 0, "sharing": "private"}
    running = Engine(model, **{**defaults, "threads": 1, **options})
    source.reader = running
    running.start()
    try:
        yield running
    finally:
        running.stop()


def prefilled(running: Engine, task: PrefillTask) -> list[Any]:
    """The events of a prefill, PrefillFinished last."""
    inbox = Inbox()
    running.prefill(task, inbox)
    events = [inbox.get()]
    while not isinstance(events[-1], PrefillFinished):
        events.append(inbox.get())
    return events[1:]  # the first says that it begins


def submit(running: Engine, task: GenerateTask | ScoreTask) -> tuple[str, Inbox]:
    """Queues a task."""
    inbox = Inbox()
    return running.submit(task, inbox), inbox


def finish(inbox: Inbox) -> tuple[list[int], Any]:
    """The tokens made, and the last event."""
    tokens: list[int] = []
    while True:
        event = inbox.until(TokensMade, Finished, Scored)
        if not isinstance(event, TokensMade):
            return tokens, event
        tokens += event.ids


def complete(running: Engine, task: GenerateTask | ScoreTask) -> tuple[list[int], Any]:
    """Runs a task to its end."""
    return finish(submit(running, task)[1])


def at_baseline(running: Engine) -> bool:
    """No session and nothing under way; of bytes, only views that nobody uses and that would give
    way."""
    held = running.snapshot().result(30)
    return (
        held.sessions == ()
        and not any(view.users for view in held.views)
        and held.nbytes.held == sum(view.nbytes for view in held.views)
        and not held.turns
        and not held.handoffs
        and not held.groups.sessions
        and not held.groups.shared
        and not held.prefills.queued
    )


class Busy:
    """Holds an engine's thread until released: it tells a sink that a task is refused, and the sink
    takes its time."""

    def __init__(self, running: Engine) -> None:
        self._entered, self._released = threading.Event(), threading.Event()
        running.submit(GenerateTask(prompt=(1,), continues="nobody"), self)
        assert self._entered.wait(10)

    def put(self, event: object) -> None:
        self._entered.set()
        self._released.wait(30)

    def ready(self) -> bool:
        return True

    def release(self) -> None:
        self._released.set()
