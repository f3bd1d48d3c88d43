"""What is taken from lm-eval's own results, whose data would come from the hub."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from lm_eval import evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

from griffin_evals import sandbox
from griffin_evals.lm import GriffinLM
from griffin_evals.tasks import local_task
from griffin_evals.tasks.data import read
from griffin_evals.tasks.errors import EvaluationError
from griffin_evals.tasks.harness import Runnable, content_of, local_runnable
from tests.unit.evals.files import GOOD, write

PAGES = ["one boat", "two boats and a harbour", "three"]
PER_UNIT = ("bits_per_byte", "word_perplexity", "byte_perplexity")


def own_task(pages: list[str], **config: Any) -> Runnable:
    """A task with results as lm-eval's own have them."""
    documents = Dataset.from_list([{"page": page} for page in pages])
    task = ConfigurableTask(
        config={
            "task": "own",
            "custom_dataset": lambda **_: {"test": documents},
            "test_split": "test",
            "num_fewshot": 0,
            **config,
        }
    )
    return Runnable(name="own", content="", task=task, metrics=(), choices_only=False)


def results_of(runnable: Runnable, lm: GriffinLM) -> Any:
    # Without bootstraps, for which lm-eval forks: a process that holds the pools of several engines
    # may be refused that (ENOMEM).
    tasks = {"tasks": {"own": runnable.task}, "groups": {}}
    return evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0)


@pytest.fixture
def lm(tiny_directory: Callable[[str], Any]) -> Any:
    lm = GriffinLM(pretrained=str(tiny_directory("llama")))
    yield lm
    lm.close()


def test_a_perplexity_for_each_word_is_made_of_documents_too(lm: GriffinLM) -> None:
    runnable = own_task(
        PAGES,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="page",
        process_results=process_results,
        metric_list=[{"metric": name} for name in PER_UNIT],
    )
    results = results_of(runnable, lm)
    measures = runnable.measures(results)
    assert list(measures) == ["word_perplexity", "byte_perplexity"]
    measured = measures["word_perplexity"]
    assert measured.value == results["results"]["own"]["word_perplexity,none"]
    assert math.exp(sum(measured.items) / len(PAGES)) == pytest.approx(measured.value)
    assert measured.perplexity
    assert measured.stderr is not None


def test_a_share_of_documents_is_the_score_before_a_perplexity(lm: GriffinLM) -> None:
    runnable = own_task(
        PAGES,
        output_type="loglikelihood",
        doc_to_text="page",
        doc_to_target="page",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )
    results = results_of(runnable, lm)
    measures = runnable.measures(results)
    assert list(measures) == ["acc", "perplexity"]
    measured = measures["perplexity"]
    assert measured.value == results["results"]["own"]["perplexity,none"]
    assert math.exp(sum(measured.items) / len(PAGES)) == pytest.approx(measured.value)


def test_without_a_sandbox_no_program_is_said_to_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = local_task("human_eval")
    data = read(task, write(tmp_path, task.name, GOOD[task.name][0]))
    assert local_runnable(task, data).name == "human_eval"
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "none.py")
    with pytest.raises(EvaluationError, match="human_eval: the sandbox cannot run programs here"):
        local_runnable(task, data)


def test_the_documents_of_a_hub_are_told_apart_by_what_they_hold() -> None:
    one, same = (Dataset.from_list([{"page": page} for page in PAGES]) for _ in range(2))
    assert content_of(one) == content_of(same) == content_of(list(same))
    other = Dataset.from_list([{"page": page} for page in reversed(PAGES)])
    assert content_of(other) != content_of(one)
