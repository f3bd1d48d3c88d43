"""Runs all combinations of tasks, settings and models, each cell once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.tasks import TaskManager

from griffin_core.model.load import DTYPES, Model, load_model
from griffin_evals.bar import Bar
from griffin_evals.cells import DENSE_SETTING, DIVERGENCE, Cells, Setting
from griffin_evals.errors import RequestRefused
from griffin_evals.journal import Journal
from griffin_evals.lm import GriffinLM
from griffin_evals.measure import TEXT_TASK, OneModel, text_content
from griffin_evals.plan import Plan, Source
from griffin_evals.tasks import local_task
from griffin_evals.tasks.harness import Runnable, hub_runnable, local_runnable, quiet

Say = Callable[[str], None]


def run(plan: Plan, bar: Bar, say: Say) -> list[str]:
    """Measures every cell that is missing. A task that a model refuses, for example because its
    texts are too long, is left out, and the others are run.

    Returns:
        A sentence for each task that was left out, with the reason.

    Raises:
        EvalError: see ``errors`` and ``tasks.errors``. Finished cells are kept.
        GriffinError: a model cannot be loaded or run.
    """
    quiet()
    os.environ["DISABLE_MULTIPROC"] = "1"  # else lm-eval forks this process, which has threads
    cells = Cells(plan.out / "cells")
    left_out: list[str] = []
    with Journal(plan.out / "journal" / "answers.jsonl") as journal:
        runnables = _runnables(plan, journal)
        cells.report_on({each.name: plan.content_of(each.name, each.content) for each in runnables})
        if plan.text:
            cells.report_on({DIVERGENCE: text_content(plan)})
        of_one = [(r, s) for r in runnables for s in _settings(plan, r)]
        beside = len(plan.generating)
        for source in plan.sources:
            here = source.target is None
            bar.expect(len(of_one))
            bar.expect(beside if here and plan.text else 0)
            bar.expect(1 + beside if plan.speed else 0)
        for source in plan.sources:
            with _opened(plan, source, say) as (lm, model):
                say(f"{source.model or source.target}: {source.way}, {lm.figures()['dtype']}")
                one = OneModel(plan, source, lm, cells, journal, bar)
                refused: set[str] = set()
                for runnable, setting in of_one:
                    if runnable.name in refused:
                        bar.finish()
                        continue
                    try:
                        one.task(runnable, setting)
                    except RequestRefused as error:
                        refused.add(runnable.name)
                        left_out.append(f"{source.model or source.target}: {error}")
                        bar.finish(f"left out: {error}")
                if model is not None and plan.text and TEXT_TASK not in refused:
                    one.divergence(model)
                if plan.speed:
                    for setting in [DENSE_SETTING, *plan.generating]:
                        one.speed(setting)
    return left_out


def _runnables(plan: Plan, journal: Journal) -> list[Runnable]:
    if plan.data is None:
        manager = TaskManager()
        return [hub_runnable(name, manager) for name in plan.tasks]
    return [
        local_runnable(local_task(name), plan.data[name], verdicts=journal) for name in plan.tasks
    ]


def _settings(plan: Plan, runnable: Runnable) -> list[Setting]:
    """Returns the settings of a task, dense first. A task with only one mode runs in generation
    mode."""
    return [DENSE_SETTING, *(plan.settings if runnable.choices_only else plan.generating)]


@contextmanager
def _opened(plan: Plan, source: Source, say: Say) -> Iterator[tuple[GriffinLM, Model | None]]:
    """Opens lm-eval's model for a source, and yields it with the loaded model if that runs in this
    process."""
    options: dict[str, Any] = {"concurrency": plan.concurrency, "seed": plan.seed}
    model: Model | None = None
    if source.target is not None:
        lm = GriffinLM(
            source.target, wait_s=plan.wait_s, tokenizer=plan.tokenizer, dtype=None, **options
        )
    else:
        assert source.model is not None
        dtype, device = DTYPES[plan.dtype], plan.device or "auto"
        model = load_model(source.model, dtype=dtype, device=device, progress=say)
        lm = GriffinLM(pretrained=model, threads=plan.threads, **options)
    try:
        yield lm, model
    finally:
        lm.close()
