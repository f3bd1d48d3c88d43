"""Driving an engine without a server."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Admitted, Failed, Finished, Scored, TokensMade
from griffin_core.engine.prefill_queue import PrefillBegun, PrefillTask
from griffin_core.engine.task import GenerateTask, ScoreTask
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


@contextlib.contextmanager
def engine(model: Model, **options: Any) -> Iterator[Engine]:
    """Runs an engine; whose caller brings it every prompt's prefill, unless told otherwise. By
    default sessions are private, so that what one makes does not depend on the others, and the
    engine runs on one thread, however many another engine of this process has left set."""
    defaults = {"own_prefill_tokens": 0, "sharing": "private", "threads": 1}
    running = Engine(model, **{**defaults, **options})
    running.start()
    try:
        yield running
    finally:
        running.stop()


def submit(running: Engine, task: GenerateTask | ScoreTask) -> tuple[str, Inbox]:
    """Queues a task."""
    inbox = Inbox()
    return running.submit(task, inbox), inbox


def hand_over(running: Engine, task: GenerateTask | ScoreTask, inbox: Inbox) -> None:
    """Waits for admission and has the prompt prefilled by the same engine."""
    admitted = inbox.until(Admitted)
    assert isinstance(admitted, Admitted), admitted
    if admitted.handoff is None:
        return
    prefilled = Inbox()
    running.prefill(PrefillTask(token_ids=task.prefilled, selection=admitted.handoff), prefilled)
    while True:
        event = prefilled.get()
        if isinstance(event, PrefillBegun):
            continue
        running.intake(task.turn_id, event)
        if type(event).__name__ == "PrefillFinished":
            return


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
    _, inbox = submit(running, task)
    hand_over(running, task, inbox)
    return finish(inbox)


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
