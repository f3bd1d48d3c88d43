"""From tasks to results: runs them on an engine and puts their events together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Event, Failed, Finished, Scored, TokensMade
from griffin_core.engine.task import GenerateTask, ScoreTask
from griffin_core.errors import EngineStopped
from griffin_core.offline.batch import run_tasks
from griffin_core.offline.completion import Piece, Score, completion_of, scores_of

StopReason = Callable[[], Exception]
"""Says why an engine that has stopped takes no more work. A generator of results holds it as long
as it runs."""

SUBMITTED_AHEAD = 8
"""Tasks that wait in the engine besides those that run, so that none of its places stays empty
while this process takes a result."""


def run_generations(
    engine: Engine,
    tasks: Sequence[GenerateTask],
    *,
    max_submitted: int,
    whole: bool,
    stop_reason: StopReason,
) -> Generator[tuple[int, Piece], None, None]:
    """Runs tasks. Yields pieces of completions, each with the index of its task.

    Args:
        max_submitted, whole: see ``run_tasks``.
    """
    made: dict[int, list[TokensMade]] = {}
    running = _run(engine, tasks, "prompts", max_submitted, whole=whole, stop_reason=stop_reason)
    with closing(running) as events:
        for index, event in events:
            match event:
                case TokensMade():
                    made.setdefault(index, []).append(event)
                    piece = Piece(text=event.text, token_ids=event.ids, logprobs=event.logprobs)
                    yield index, piece
                case Finished():
                    completion = completion_of(tasks[index], made.pop(index), event)
                    yield index, Piece(completion=completion)


def run_scores(
    engine: Engine,
    tasks: Sequence[ScoreTask],
    name: str,
    *,
    max_submitted: int,
    stop_reason: StopReason,
) -> Generator[tuple[int, list[Score]], None, None]:
    """Runs tasks. Yields the scores of each task with its index.

    Args:
        name: what the caller calls the tasks.
        max_submitted: see ``run_tasks``.
    """
    running = _run(engine, tasks, name, max_submitted, whole=True, stop_reason=stop_reason)
    with closing(running) as events:
        for index, event in events:
            if isinstance(event, Scored):
                yield index, scores_of(tasks[index], event)


def _run(
    engine: Engine,
    tasks: Sequence[GenerateTask | ScoreTask],
    name: str,
    max_submitted: int,
    *,
    whole: bool,
    stop_reason: StopReason,
) -> Generator[tuple[int, Event], None, None]:
    """Runs tasks. The error of one task ends all of them."""
    with closing(run_tasks(engine, tasks, most=max_submitted, whole=whole)) as events:
        for index, event in events:
            if isinstance(event, Failed):
                if isinstance(event.error, EngineStopped):
                    raise stop_reason() from event.error
                event.error.add_note(f"in {name}[{index}]")
                raise event.error
            yield index, event
