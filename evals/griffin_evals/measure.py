"""Measures the cells of one model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import lm_eval

from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.selection import Selection
from griffin_core.model.load import Model
from griffin_evals.bar import Bar
from griffin_evals.cells import DIVERGENCE, SPEED, Cell, Cells, Identity, Measured, Setting
from griffin_evals.errors import RequestRefused
from griffin_evals.journal import Journal
from griffin_evals.kl import PROMPT_TOKENS, SCORED_TOKENS, divergences, token_windows
from griffin_evals.lm import GriffinLM
from griffin_evals.paired import mean_of
from griffin_evals.plan import Plan, Source
from griffin_evals.recipes import parse_recipe
from griffin_evals.settings import Settings
from griffin_evals.speed import WHAT, tokens_per_second
from griffin_evals.tasks.errors import EvaluationError
from griffin_evals.tasks.harness import Runnable

BOOTSTRAPS = 1000
"""The number of bootstrap resamples for standard errors for which lm-eval has no formula."""

TEXT_TASK = "wikitext"
"""The task on whose text KL is measured."""

VERSIONS = {name: version(name) for name in ("griffin-serving", "lm-eval", "torch", "transformers")}


def text_content(plan: Plan) -> str:
    """Returns a digest of everything that the KL on a plan's text depends on."""
    described = f"{PROMPT_TOKENS} {SCORED_TOKENS} {plan.text}"
    return plan.content_of(TEXT_TASK, hashlib.sha256(described.encode()).hexdigest())


class OneModel:
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
        recipe = parse_recipe(setting.policy)
        return self._lm.with_settings(
            density=setting.density,
            policy=recipe.policy,
            correction=recipe.correction,
            correction_rank=recipe.rank or None,
            warmup_tokens=recipe.warmup,
            score_mode=setting.mode,
            journal=journal,
        )

    def task(self, runnable: Runnable, setting: Setting) -> None:
        content = self._plan.content_of(runnable.name, runnable.content)
        identity = self._identity(runnable.name, content, setting)
        if self._cells.get(identity) is not None:
            self._bar.finish()
            return
        self._bar.begin(words(runnable.name, setting))
        lm = self._with(setting, self._journal)
        # simple_evaluate would take seconds to describe this machine, each time.
        results = lm_eval.evaluate(
            lm=lm,
            task_dict={"tasks": {runnable.task.task_name: runnable.task}, "groups": {}},
            limit=self._plan.limit_of(runnable.name),
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
        )
        measures = runnable.measures(results)
        if not measures:
            raise EvaluationError(f"{runnable.name}: has no measure with a value for each document")
        self._put(identity, measures, lm.figures())

    def divergence(self, model: Model) -> None:
        """KL and agreement. All settings of a window are run together: its prompt is read once."""
        windows = token_windows(model.tokenizer.encode(self._plan.text))
        windows = windows[: self._plan.limit_of(TEXT_TASK)]
        if not windows:
            raise EvaluationError("wikitext: the file is shorter than a window; see evaluation.md")
        content = text_content(self._plan)
        settings = self._plan.generating
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
        recipe = parse_recipe(setting.policy)
        return Selection(
            density=setting.density,
            policy=recipe.policy,
            correction=CorrectionParams(kind=recipe.correction, rank=recipe.rank),
            seed=seed,
        )

    def speed(self, setting: Setting) -> None:
        identity = self._identity(SPEED, WHAT, setting)
        if self._cells.get(identity) is not None:
            self._bar.finish()
            return
        self._bar.begin(words("tokens a second", setting))
        try:
            rates = tokens_per_second(self._with(setting, None))
        except RequestRefused as error:  # for example, the context length is below that of a window
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
        if figures.get("from_journal") == 0 and figures["seconds"] > 0:
            figures = {**figures, "tokens_per_second": figures["tokens"] / figures["seconds"]}
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
    """Returns the name of a cell in progress messages."""
    if setting.dense:
        return f"{task} dense"
    mode = "" if setting.mode == "generation" else f" {setting.mode}"
    return f"{task} {setting.policy} {setting.density:g}{mode}"
