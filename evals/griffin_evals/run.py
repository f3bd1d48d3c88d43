"""Runs tasks × settings × models, each cell once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from griffin_core.choices import PolicyName
from griffin_core.experts.selection import Selection
from griffin_core.model.load import DTYPES, Model, load_model
from griffin_evals.cells import (
    DENSE_SETTING,
    DIVERGENCE,
    SPEED,
    Cell,
    Cells,
    Identity,
    Measured,
    Setting,
)
from griffin_evals.errors import RequestRefused
from griffin_evals.journal import Journal
from griffin_evals.kl import PROMPT_TOKENS, divergences, token_windows
from griffin_evals.lm import GriffinLM
from griffin_evals.paired import mean_of
from griffin_evals.settings import Settings
from griffin_evals.speed import WHAT, tokens_per_second
from griffin_evals.tasks import local_task
from griffin_evals.tasks.data import LocalData
from griffin_evals.tasks.errors import EvaluationError
from griffin_evals.tasks.harness import Runnable, hub_runnable, local_runnable, quiet

BOOTSTRAPS = 1000
"""Resamplings for a standard error, where lm-eval has no formula."""

VERSIONS = {name: version(name) for name in ("griffin-serving", "lm-eval", "torch", "transformers")}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model is: in this process by ``model``, or behind a server at ``target``."""

    model: str | None = None
    target: str | None = None

    @property
    def way(self) -> str:
        return "in process" if self.target is None else "server"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run, all of it checked.

    Args:
        tasks: names, in order.
        data: the local files of these tasks; None for lm-eval's own from the hub.
        settings: without the dense one, which is always run.
        limit: most documents of a task, and windows of a text; None for all.
        seed: of the policies that draw.
        speed: whether tokens a second are measured.
        tokenizer, concurrency, wait_s, threads, device: as ``GriffinLM`` takes them.
    """

    sources: Sequence[Source]
    tasks: Sequence[str]
    data: dict[str, LocalData] | None
    settings: Sequence[Setting]
    out: Path
    limit: int | None = None
    seed: int = 0
    dtype: str = "float32"
    speed: bool = True
    tokenizer: str | None = None
    concurrency: int = 32
    wait_s: float = 300
    threads: int | None = None
    device: str | None = None


Say = Callable[[str], None]


class Bar:
    """How many cells are done: one line before each, as each has a bar of its own for requests."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("cells"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, TextColumn("{task.description}"), console=console, auto_refresh=False
        )
        self._row = self._progress.add_task("", total=0)
        self.done = self.total = 0

    def expect(self, cells: int) -> None:
        self.total += cells
        self._progress.update(self._row, total=self.total)

    def begin(self, words: str) -> None:
        self._progress.update(self._row, description=words)
        self._console.print(self._progress.get_renderable())

    def finish(self, words: str | None = None) -> None:
        self.done += 1
        self._progress.update(self._row, completed=self.done)
        if words:
            self._console.print(words, markup=False, soft_wrap=True)


def run(plan: Plan, bar: Bar, say: Say) -> None:
    """Measures every cell that is not there yet.

    Raises:
        EvaluationError, EvalError: see ``tasks.errors`` and ``errors``. What is done stays.
    """
    quiet()
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork this process, with its threads
    cells = Cells(plan.out / "cells")
    with Journal(plan.out / "journal" / "answers.jsonl") as journal:
        runnables = _runnables(plan, journal)
        text = _text(plan)
        of_one = [(r, s) for r in runnables for s in _settings(plan, r)]
        beside = len(_generating(plan))
        for source in plan.sources:
            here = source.target is None
            bar.expect(len(of_one))
            bar.expect(beside if here and text else 0)
            bar.expect(1 + beside if plan.speed else 0)
        for source in plan.sources:
            with _opened(plan, source, say) as (lm, model):
                say(f"{source.model or source.target}: {source.way}, {lm.figures()['dtype']}")
                one = _OneModel(plan, source, lm, cells, journal, bar)
                for runnable, setting in of_one:
                    one.task(runnable, setting)
                if model is not None and text:
                    one.divergence(model, text)
                if plan.speed:
                    for setting in [DENSE_SETTING, *_generating(plan)]:
                        one.speed(setting)


def _runnables(plan: Plan, journal: Journal) -> list[Runnable]:
    if plan.data is None:
        manager = TaskManager()
        return [hub_runnable(name, manager) for name in plan.tasks]
    return [
        local_runnable(local_task(name), plan.data[name], verdicts=journal) for name in plan.tasks
    ]


def _text(plan: Plan) -> str:
    """What KL is measured on: the local text file, if it is among the tasks."""
    return next((data.text for data in (plan.data or {}).values() if data.text), "")


def _settings(plan: Plan, runnable: Runnable) -> list[Setting]:
    """Dense first. Where the classification mode means nothing, the generation mode is run."""
    settings = plan.settings if runnable.choices_only else _generating(plan)
    return [DENSE_SETTING, *dict.fromkeys(settings)]


def _generating(plan: Plan) -> list[Setting]:
    """The settings in generation mode, each once."""
    return list(
        dict.fromkeys(
            Setting(mode="generation", density=s.density, policy=s.policy) for s in plan.settings
        )
    )


@contextmanager
def _opened(plan: Plan, source: Source, say: Say) -> Iterator[tuple[GriffinLM, Model | None]]:
    """A model, with the model itself where it is in this process."""
    options: dict[str, Any] = {"concurrency": plan.concurrency, "seed": plan.seed}
    model: Model | None = None
    if source.target is not None:
        lm = GriffinLM(
            source.target, wait_s=plan.wait_s, tokenizer=plan.tokenizer, dtype=None, **options
        )
    else:
        assert source.model is not None
        dtype: torch.dtype = DTYPES[plan.dtype]
        model = load_model(source.model, dtype=dtype, device=plan.device or "auto", progress=say)
        lm = GriffinLM(pretrained=model, threads=plan.threads, **options)
    try:
        yield lm, model
    finally:
        lm.close()


class _OneModel:
    """The cells of one model."""

    def __init__(
        self, plan: Plan, source: Source, lm: GriffinLM, cells: Cells, journal: Journal, bar: Bar
    ) -> None:
        self._plan, self._source, self._lm = plan, source, lm
        self._cells, self._journal, self._bar = cells, journal, bar
        facts = lm.figures()
        self._name = source.model or str(facts["model"])
        self._fingerprint, self._dtype = str(facts["fingerprint"]), str(facts["dtype"])

    def _identity(self, task: str, content: str, setting: Setting) -> Identity:
        return Identity(
            model=self._name,
            fingerprint=self._fingerprint,
            way=self._source.way,
            dtype=self._dtype,
            task=task,
            content=content,
            limit=self._plan.limit,
            seed=self._plan.seed,
            setting=setting,
            lm_eval=VERSIONS["lm-eval"],
        )

    def _with(self, setting: Setting, journal: Journal | None) -> GriffinLM:
        if setting.dense:
            return self._lm.with_settings(density=1.0, journal=journal)
        return self._lm.with_settings(
            density=setting.density,
            policy=cast(PolicyName, setting.policy),
            score_mode=setting.mode,
            journal=journal,
        )

    def task(self, runnable: Runnable, setting: Setting) -> None:
        identity = self._identity(runnable.name, runnable.content, setting)
        if self._cells.get(identity) is not None:
            self._bar.finish()
            return
        self._bar.begin(words(runnable.name, setting))
        lm = self._with(setting, self._journal)
        # simple_evaluate would describe this machine for seconds, each time.
        results = lm_eval.evaluate(
            lm=lm,
            task_dict={"tasks": {runnable.task.task_name: runnable.task}, "groups": {}},
            limit=self._plan.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
        )
        measures = runnable.measures(results)
        if not measures:
            raise EvaluationError(f"{runnable.name}: has no measure with a value for each document")
        self._put(identity, measures, lm.figures())

    def divergence(self, model: Model, text: str) -> None:
        """KL and agreement. All settings of a window are run together: its prompt is read once."""
        windows = token_windows(model.tokenizer.encode(text))[: self._plan.limit]
        if not windows:
            raise EvaluationError("wikitext: the file is shorter than a window; see evaluation.md")
        content = hashlib.sha256(json.dumps(windows).encode()).hexdigest()
        settings = _generating(self._plan)
        identities = {s: self._identity(DIVERGENCE, content, s) for s in settings}
        missing = [s for s in settings if self._cells.get(identities[s]) is None]
        for _ in range(len(settings) - len(missing)):
            self._bar.finish()
        if not missing:
            return
        self._bar.begin(f"KL, {len(windows)} windows, {len(missing)} settings")
        for number, window in enumerate(windows):
            keys = {s: self._key(identities[s], number) for s in missing}
            left = [s for s in missing if self._journal.get(keys[s]) is None]
            if not left:
                continue
            selections = [self._selection(s, number) for s in left]
            made = divergences(model, window, PROMPT_TOKENS, selections)
            for setting, each in zip(left, made, strict=True):
                self._journal.put(keys[setting], [each.kl, each.agreement])
        for setting in missing:
            every = [self._key(identities[setting], number) for number in range(len(windows))]
            kept = [self._journal.get(key) for key in every]
            measures = {
                "kl": _mean([kl for kl, _ in kept], higher_is_better=False),
                "agreement": _mean([agreement for _, agreement in kept], higher_is_better=True),
            }
            self._put(identities[setting], measures, {"windows": len(windows)})

    @staticmethod
    def _key(identity: Identity, window: int) -> str:
        return f"{DIVERGENCE}:{identity.digest}:{window}"

    def _selection(self, setting: Setting, window: int) -> Selection:
        seed = Settings(seed=self._plan.seed).seed_of(DIVERGENCE, window)
        policy = cast(PolicyName, setting.policy)
        return Selection(density=setting.density, policy=policy, seed=seed)

    def speed(self, setting: Setting) -> None:
        identity = self._identity(SPEED, WHAT, setting)
        if self._cells.get(identity) is not None:
            self._bar.finish()
            return
        self._bar.begin(words("tokens a second", setting))
        try:
            rates = tokens_per_second(self._with(setting, None))
        except RequestRefused as error:  # a context length below what is measured, say
            self._bar.finish(f"tokens a second are not measured: {error}")
            return
        if not rates:
            self._bar.finish("tokens a second are not measured: the completions ended at once")
            return
        measure = _mean(rates, higher_is_better=True)
        self._put(identity, {"tokens_per_second": measure}, {"what": WHAT})

    def _put(
        self, identity: Identity, measures: dict[str, Measured], figures: dict[str, Any]
    ) -> None:
        cell = Cell(identity=identity, measures=measures, figures={**figures, "versions": VERSIONS})
        self._cells.put(cell)
        name, first = next(iter(measures.items()))
        error = "" if first.stderr is None else f" ± {first.stderr:.4f}"
        cell_words = words(identity.task, identity.setting)
        self._bar.finish(f"{cell_words}: {name} {first.value:.4f}{error}, n {cell.n}")


def _mean(items: Sequence[float], *, higher_is_better: bool) -> Measured:
    mean = mean_of(items)
    return Measured(
        value=mean.mean, stderr=mean.stderr, higher_is_better=higher_is_better, items=items
    )


def words(task: str, setting: Setting) -> str:
    """A cell, for people."""
    if setting.dense:
        return f"{task} dense"
    mode = "" if setting.mode == "generation" else f" {setting.mode}"
    return f"{task} {setting.policy} {setting.density:g}{mode}"
