"""Runs many tasks on one engine: a bounded number at a time, with their events as they come."""

from __future__ import annotations

import queue
import time
from collections.abc import Generator, Sequence
from dataclasses import replace

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Event, Failed, Finished, Scored
from griffin_core.engine.task import GenerateTask, ScoreTask

Arrivals = queue.SimpleQueue[tuple[int, list[Event]]]
"""Index of a task, and its events."""


class _Inbox:
    """The sink of one task. It is always ready: only a bounded number of tasks is submitted, and a
    session that waited for its reader would hold its place in the engine, perhaps while the reader
    waits for another session to get one.

    Args:
        whole: pass the events on all together, after the last one, so that no token wakes the
            reader.
    """

    def __init__(self, index: int, arrivals: Arrivals, *, whole: bool) -> None:
        self._index = index
        self._arrivals = arrivals
        self._whole = whole
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        self._events.append(event)
        if not self._whole or isinstance(event, Finished | Scored | Failed):
            self._arrivals.put((self._index, self._events))
            self._events = []

    def ready(self) -> bool:
        return True


def run_tasks(
    engine: Engine, tasks: Sequence[GenerateTask | ScoreTask], *, most: int, whole: bool
) -> Generator[tuple[int, Event], None, None]:
    """Runs tasks to their end. They are submitted in order.

    Closing the iterator, or an exception in it, cancels what still runs.

    Args:
        most: most tasks that are submitted and have not ended, at least 1.
        whole: whether the events of a task come all together, when it has ended.

    Yields:
        The index of a task, and one of its events. The last event of a task is Finished, Scored or
        Failed.
    """
    arrivals: Arrivals = queue.SimpleQueue()
    submitted: dict[int, str] = {}  # index -> turn id, of those that have not ended
    coming = enumerate(tasks)
    try:
        while True:
            while len(submitted) < most and (following := next(coming, None)):
                index, task = following
                submitted[index] = task.turn_id  # before submit: an interrupt may come between
                engine.submit(
                    replace(task, arrived=time.monotonic()), _Inbox(index, arrivals, whole=whole)
                )
            if not submitted:
                return
            index, events = arrivals.get()
            for event in events:
                if isinstance(event, Finished | Scored | Failed):
                    del submitted[index]
                yield index, event
    finally:
        for turn_id in submitted.values():
            engine.cancel(turn_id)
