"""Tasks as lm-eval runs them: ours over local files, and lm-eval's own over the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from griffin_evals.cells import Measured
from griffin_evals.journal import Journal
from griffin_evals.paired import Estimate, mean_of
from griffin_evals.sandbox import ProgramLimits, run_program
from griffin_evals.tasks import Metric, Task, give_data, hub_name, metrics, task_named
from griffin_evals.tasks.data import LocalData
from griffin_evals.tasks.errors import EvaluationError

OUR_SPLIT = "test"

FEWSHOT_SEED = 1234
"""lm-eval's default seed, which chooses the few-shot examples of its own tasks."""

PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")
"""Measures of lm-eval's tasks and of ours that are perplexities."""

Values = Callable[[Mapping[str, Any], Sequence[Any]], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Runnable:
    """A task that lm-eval can run.

    Args:
        name: its name in cells and tables.
        content: a digest of everything that its figures depend on, except the model.
        task: lm-eval's object.
        metrics: the measures taken from its results; empty for all of them.
        choices_only: whether it can run in classification mode.
    """

    name: str
    content: str
    task: Any
    metrics: Sequence[Metric]
    choices_only: bool

    def measures(self, results: Mapping[str, Any]) -> dict[str, Measured]:
        """Returns the measures in the results of ``lm_eval.simple_evaluate``, with each document's
        value."""
        name = self.task.task_name
        found = cast(Mapping[str, Any], results["results"][name])
        samples = cast(Sequence[Mapping[str, Any]], results["samples"][name])
        better = cast(Mapping[str, bool], results["higher_is_better"][name])
        declared = {metric.name: metric for metric in self.metrics}
        measures = {}
        for key, value in found.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or (declared and metric not in declared):
                continue
            items = [each[metric] for each in samples if each["filter"] == chosen]
            perplexity = metric in PERPLEXITIES
            if not declared and perplexity:
                items, mean = _nats(items)
            elif items and all(isinstance(item, int | float) for item in items):
                mean = mean_of(items)
            else:
                continue  # a measure over all documents, which cannot be paired
            stderr = found.get(f"{metric}_stderr,{chosen}")
            if perplexity:  # to first order
                stderr = None if mean.stderr is None else value * mean.stderr
            elif not isinstance(stderr, float):
                stderr = mean.stderr
            measures[metric if chosen == "none" else f"{metric} ({chosen})"] = Measured(
                value=value,
                stderr=stderr,
                higher_is_better=better[metric],
                perplexity=perplexity,
                items=[float(item) for item in items],
            )
        # In lm-eval's own tasks too, measures that are shares of documents come first.
        order = list(declared) or sorted(measures, key=lambda each: measures[each].perplexity)
        return {name: measures[name] for name in order if name in measures}


def _nats(items: Sequence[Any]) -> tuple[list[float], Estimate]:
    """Returns the nats of documents, whose mean is the logarithm of lm-eval's perplexity, and that
    mean.

    Args:
        items: log-likelihoods; or pairs of a log-likelihood and its number of words or bytes, for
            a perplexity per word or byte.
    """
    pairs = [item if isinstance(item, tuple) else (item, 1) for item in items]
    share = len(pairs) / sum(weight for _, weight in pairs)
    nats = [-logprob * share for logprob, _ in pairs]
    mean = statistics.fmean(nats)
    # A ratio's error, to first order: a long document has more nats, but not more for each word.
    rest = [each - mean * weight * share for each, (_, weight) in zip(nats, pairs, strict=True)]
    return nats, Estimate(mean=mean, stderr=mean_of(rest).stderr)


def local_runnable(task: Task, data: LocalData, *, verdicts: Journal | None = None) -> Runnable:
    """Returns a task over a local file.

    Args:
        verdicts: the verdicts of programs that were run before, for a task whose answers are
            programs.

    Raises:
        EvaluationError: the answers are programs, and none can be run here.
    """
    values = task.values
    if task.kind == "program":
        works = run_program("pass")
        if not works.passed:  # every program would fail
            raise EvaluationError(
                f"{task.name}: the sandbox cannot run programs here: {works.reason}"
            )
        values = passes(verdicts)
    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {OUR_SPLIT: Dataset.from_list(list(data.documents))},
        "test_split": OUR_SPLIT,
        "num_fewshot": 0,
        "metric_list": [_declared(metric) for metric in task.metrics],
    }
    if values is not None:
        config["process_results"] = values
    if task.kind == "choices":
        config |= {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        }
    elif task.kind in ("continuation", "text"):
        config |= {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "continuation",
            "target_delimiter": "",
        }
    else:
        config |= {
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "prompt",  # not used: process_results compares
            "generation_kwargs": {
                "until": list(task.until),
                "max_gen_toks": task.max_tokens,
                "do_sample": False,
            },
        }
    described = [list(data.documents), config.get("generation_kwargs"), task.metrics]
    content = hashlib.sha256(json.dumps(described, default=asdict).encode()).hexdigest()
    return Runnable(
        name=task.name,
        content=content,
        task=ConfigurableTask(config=config),
        metrics=task.metrics,
        choices_only=task.choices_only,
    )


def _declared(metric: Metric) -> dict[str, Any]:
    return {
        "metric": metric.name,
        "aggregation": metrics.exp_of_mean if metric.perplexity else "mean",
        "higher_is_better": metric.higher_is_better,
    }


def passes(verdicts: Journal | None, limits: ProgramLimits | None = None) -> Values:
    """Returns a function of the values of a program: whether it passes its tests. It runs each
    program once."""
    limits = limits or ProgramLimits()

    def values(document: Mapping[str, Any], results: Sequence[str]) -> Mapping[str, float]:
        program = f"{document['prompt']}{results[0]}\n{document['tests']}"
        key = hashlib.sha256(f"{limits}\n{program}".encode()).hexdigest()
        passed = None if verdicts is None else verdicts.get(key)
        if passed is None:
            passed = run_program(program, limits).passed
            if verdicts is not None:
                verdicts.put(key, passed)
        return {"pass@1": float(passed)}

    return values


def hub_runnable(name: str, manager: TaskManager) -> Runnable:
    """Returns lm-eval's own task, whose data comes from the hub.

    Raises:
        EvaluationError: there is no task with that name, its data cannot be fetched, or it runs
            programs.
    """
    theirs, here = hub_name(name), give_data(task_named(name))
    if theirs not in manager.all_subtasks:
        raise EvaluationError(f"tasks: got {name!r}; allowed: what lm_eval ls tasks lists")
    try:
        task = manager.load([theirs])["tasks"][theirs]
        documents = task.eval_docs
    except Exception as error:  # datasets and the hub raise many kinds of errors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise EvaluationError(
            f"{name}: its data cannot be fetched from the hub ({reason}){here}"
        ) from (error)
    if getattr(task, "UNSAFE_CODE", False):
        raise EvaluationError(f"{name}: lm-eval would run programs without a sandbox{here}")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return Runnable(
        name=name,
        content=f"{theirs}:{task.VERSION}:{content_of(documents)}",
        task=task,
        metrics=(),
        choices_only=task.OUTPUT_TYPE == "multiple_choice",
    )


def content_of(documents: Iterable[Any]) -> str:
    """Returns a digest of documents that is the same in every process. The fingerprint of
    ``datasets`` is random if it cannot hash the function that made them."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, default=repr).encode())
    return digest.hexdigest()


def quiet() -> None:
    """Silences lm-eval's warnings about settings that we set on purpose; errors are still shown."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
