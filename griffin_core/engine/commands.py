"""What other threads may tell the engine's thread to do, and the queue in which it waits.

``dispatch`` says in one ``match`` what becomes of each command.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from griffin_core.engine.events import Event
from griffin_core.engine.ports import Sink
from griffin_core.engine.prefill_run import PrefillRun
from griffin_core.engine.task import GenerateTask, ScoreTask
from griffin_core.forward.events import (
    PrefillEvent,
)


@dataclass(frozen=True)
class Submit:
    """Queue a task for admission."""

    task: GenerateTask | ScoreTask
    sink: Sink[Event]


@dataclass(frozen=True)
class HandoffEvent:
    """A prefill source has an event for a turn."""

    turn_id: str
    event: PrefillEvent


@dataclass(frozen=True)
class HandoffFailed:
    """A prefill source cannot finish the prefill of a turn."""

    turn_id: str
    error: Exception


@dataclass(frozen=True)
class Cancel:
    """End a turn, and its session with it: its caller has gone."""

    turn_id: str


@dataclass(frozen=True)
class Prefill:
    """Queue a prompt that is for no session of this engine."""

    run: PrefillRun


@dataclass(frozen=True)
class Wake:
    """Look again whether there is work: a sink has become ready, or a flag was set."""


@dataclass(frozen=True)
class CloseSession:
    """Free a session, whatever it is doing. The answer is None.

    Args:
        owner: whose it must be; None for anybody's.
    """

    session_id: str
    owner: str | None


@dataclass(frozen=True)
class GetSession:
    """The answer is the SessionInfo of one session.

    Args:
        owner: whose it must be; None for anybody's.
    """

    session_id: str
    owner: str | None


@dataclass(frozen=True)
class ListSessions:
    """The answer is a list with the SessionInfo of every session, oldest first."""


@dataclass(frozen=True)
class GetSessionPage:
    """The answer is a SessionPage of up to ``size`` sessions with numbers above ``after``.

    Args:
        owner: whose sessions; None for everybody's.
    """

    after: int
    size: int
    owner: str | None


@dataclass(frozen=True)
class GetUsage:
    """The answer is the Usage: how many sessions there are and the bytes they hold."""


@dataclass(frozen=True)
class TakeSnapshot:
    """The answer is an EngineSnapshot.

    Args:
        contents: see ``Engine.snapshot``.
    """

    contents: bool


Question = CloseSession | GetSession | ListSessions | GetSessionPage | GetUsage | TakeSnapshot


@dataclass(frozen=True)
class Ask:
    """Answer a question. An exception becomes the future's exception; a question whose future was
    cancelled is not answered."""

    question: Question
    answer: Future[Any]


Order = Submit | HandoffEvent | HandoffFailed | Cancel | Prefill | Wake | Question
"""What ``dispatch`` does. Questions come in an ``Ask``."""

Command = Submit | HandoffEvent | HandoffFailed | Cancel | Prefill | Wake | Ask


class Arrivals:
    """Counts requests that are being prepared and are about to be submitted. An engine that has
    nothing else to do waits a moment for them, so that prompts that come together are read in one
    pass. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.expected = 0
        """The number of these requests."""

    def announce(self) -> None:
        """Counts a request. ``settle`` must follow."""
        with self._lock:
            self.expected += 1

    def settle(self) -> None:
        """The request was submitted, or never will be."""
        with self._lock:
            self.expected -= 1


class CommandQueue:
    """Commands on their way to the engine's thread. ``post`` and ``stop`` may be called from any
    thread, ``take`` only from the engine's."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._lock = threading.Lock()  # so that no command is posted after ``stop``
        self.stopped = False
        """Whether the engine is to end. No command is accepted any more."""

    def post(self, command: Command) -> bool:
        """Queues a command. False if the engine is stopping: the command will not be run."""
        with self._lock:
            if not self.stopped:
                self._commands.put(command)
            return not self.stopped

    def stop(self) -> None:
        """Tells the engine's thread to end."""
        with self._lock:
            self.stopped = True
            self._commands.put(Wake())

    def take(self, timeout_s: float | None = 0.0) -> Command | None:
        """The next command, or None if there is none within a time.

        Args:
            timeout_s: seconds to wait for it; None waits without end.
        """
        try:
            if timeout_s == 0.0:
                return self._commands.get_nowait()
            return self._commands.get(timeout=timeout_s)
        except queue.Empty:
            return None
