"""An engine under load, without a server: the tokens of several sessions, with their times."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Event, Failed, Finished, TokensMade
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.choices import Sharing


class Inbox:
    """A sink that records the time of each token, by ``time.perf_counter``."""

    def __init__(self) -> None:
        self.submitted = time.perf_counter()
        self.moments: list[float] = []
        self._end: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        if isinstance(event, TokensMade):
            self.moments += [time.perf_counter()] * len(event.ids)
        elif isinstance(event, Failed | Finished):
            self._end.put(event)

    def ready(self) -> bool:
        return True

    def finished(self) -> Finished:
        """Waits for the end of the session."""
        event = self._end.get()
        assert isinstance(event, Finished), event
        return event


def prompt(number: int, tokens: int) -> list[int]:
    """Returns token ids, different ones for each number."""
    return [(number * 37 + index) % 40_000 + 5 for index in range(tokens)]


def submit(
    engine: Engine, token_ids: Sequence[int], tokens: int, *, density: float, sharing: Sharing
) -> Inbox:
    """Starts a completion of a given number of tokens."""
    inbox = Inbox()
    task = GenerateTask(
        prompt=tuple(token_ids),
        stopping=StoppingParams(max_tokens=tokens, ignore_eos=True),
        pruning=PruningParams(density=density, sharing=sharing),
    )
    engine.submit(task, inbox)
    return inbox


def engine_moments(
    engine: Engine,
    sessions: int,
    prompt_tokens: int,
    tokens: int,
    *,
    density: float,
    sharing: Sharing,
) -> list[list[float]]:
    """Returns the times of the tokens of each of several sessions."""
    inboxes = [
        submit(engine, prompt(number, prompt_tokens), tokens, density=density, sharing=sharing)
        for number in range(sessions)
    ]
    for inbox in inboxes:
        inbox.finished()
    return [inbox.moments for inbox in inboxes]


def step_s(moments: Sequence[Sequence[float]]) -> float:
    """Returns the seconds of a step while all sessions are live and past their second token."""
    begin, end = max(own[1] for own in moments), min(own[-1] for own in moments)
    made = sum(begin < moment <= end for own in moments for moment in own)
    return (end - begin) * len(moments) / made
