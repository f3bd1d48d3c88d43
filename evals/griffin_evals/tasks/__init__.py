"""The tasks of ``griffin eval`` over local files, and the matching tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from griffin_evals.tasks import columns, metrics
from griffin_evals.tasks.columns import Row
from griffin_evals.tasks.errors import EvaluationError

Kind = Literal["choices", "continuation", "generation", "program", "text"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measure of a task.

    Args:
        higher_is_better: whether more of it is better.
        perplexity: its documents' values are nats; the task's value is exp of their mean.
    """

    name: str
    higher_is_better: bool = True
    perplexity: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task over a local file.

    Args:
        name: its name, with which its file's name begins too.
        kind: "choices", "continuation" and "generation" are run on JSON lines; "program" too, whose
            answers are run; "text" on a text file.
        rows: the supported layouts of a line.
        metrics: the first is the task's score.
        hub: lm-eval's own task, for runs without a local file.
        values: makes a document's values of the model's answers; None for those of a program.
        until: strings that end a generated answer, in addition to the end token.
        max_tokens: the most tokens of a generated answer.
    """

    name: str
    kind: Kind
    rows: tuple[type[Row], ...] = ()
    metrics: tuple[Metric, ...]
    hub: str | None
    aliases: tuple[str, ...] = ()
    values: Callable[[Mapping[str, Any], Sequence[Any]], Mapping[str, float]] | None = None
    until: tuple[str, ...] = ()
    max_tokens: int = 0

    @property
    def suffix(self) -> str:
        return ".txt" if self.kind == "text" else ".jsonl"

    @property
    def choices_only(self) -> bool:
        """Whether it can run in classification mode."""
        return self.kind == "choices"


_OF_CHOICES = (
    Metric(name="acc"),
    Metric(name="acc_norm"),
    Metric(name=metrics.BITS, higher_is_better=False),
)
_ROUGE = tuple(Metric(name=name) for name in ("rougeL", "rouge1", "rouge2"))


def _choices(name: str, hub: str, *rows: type[Row], aliases: tuple[str, ...] = ()) -> Task:
    return Task(
        name=name,
        kind="choices",
        hub=hub,
        rows=rows,
        metrics=_OF_CHOICES,
        aliases=aliases,
        values=metrics.choice,
    )


TASKS: tuple[Task, ...] = (
    _choices("hellaswag", "hellaswag", columns.Choices, columns.HellaSwag),
    _choices("piqa", "piqa", columns.QuestionChoices, columns.Piqa),
    _choices("copa", "copa", columns.Choices, columns.Copa),
    _choices(
        "arc_easy", "arc_easy", columns.QuestionChoices, columns.Arc, aliases=("arc_e", "arce")
    ),
    _choices(
        "arc_challenge",
        "arc_challenge",
        columns.QuestionChoices,
        columns.Arc,
        aliases=("arc_c", "arcc"),
    ),
    _choices("boolq", "boolq", columns.QuestionChoices, columns.BoolQ, columns.BoolQLabel),
    Task(
        name="xsum",
        kind="generation",
        rows=(columns.SummaryPrompt, columns.XSum),
        metrics=_ROUGE,
        hub=None,
        values=metrics.rouge,
        until=("###",),
        max_tokens=64,
    ),
    Task(
        name="cnn_dailymail",
        kind="generation",
        rows=(columns.SummaryPrompt, columns.CnnDailyMail),
        metrics=_ROUGE,
        hub="cnn_dailymail",
        aliases=("cnn_dm", "cnn"),
        values=metrics.rouge,
        until=("###",),
        max_tokens=128,
    ),
    Task(
        name="coqa",
        kind="generation",
        rows=(columns.CoQA,),
        metrics=(Metric(name="f1"), Metric(name="em")),
        hub="coqa",
        values=metrics.conversation,
        until=("\nQ:", "\n\n"),
        max_tokens=64,
    ),
    Task(
        name="qasper",
        kind="generation",
        rows=(columns.Qasper, columns.QasperPaper),
        metrics=(Metric(name="f1"),),
        hub="qasper_freeform",
        values=metrics.best_f1,
        until=("\n",),
        max_tokens=128,
    ),
    Task(
        name="lambada",
        kind="continuation",
        rows=(columns.Lambada,),
        metrics=(
            Metric(name="acc"),
            Metric(name="perplexity", higher_is_better=False, perplexity=True),
        ),
        hub="lambada_openai",
        values=metrics.last_word,
    ),
    Task(
        name="gsm8k",
        kind="generation",
        rows=(columns.Gsm8k,),
        metrics=(Metric(name="exact_match"),),
        hub="gsm8k",
        values=metrics.final_number,
        until=("Question:",),
        max_tokens=256,
    ),
    Task(
        name="human_eval",
        kind="program",
        rows=(columns.HumanEval,),
        metrics=(Metric(name="pass@1"),),
        hub=None,
        aliases=("humaneval",),
        until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        max_tokens=512,
    ),
    Task(
        name="wikitext",
        kind="text",
        metrics=(Metric(name="word_perplexity", higher_is_better=False, perplexity=True),),
        hub="wikitext",
        values=metrics.nats_per_word,
    ),
)


def squeezed(name: str) -> str:
    """Normalizes a name for comparison: lower case, without punctuation."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def task_named(name: str) -> Task | None:
    """Returns the task with that name or alias, or None."""
    wanted = squeezed(name)
    for task in TASKS:
        if wanted in map(squeezed, (task.name, *task.aliases)):
            return task
    return None


def local_task(name: str) -> Task:
    """Does the same as ``task_named``, but raises if there is no such task.

    Raises:
        EvaluationError: there is none.
    """
    if task := task_named(name):
        return task
    allowed = ", ".join(task.name for task in TASKS)
    raise EvaluationError(f"tasks: got {name!r}; allowed with --data: {allowed}")


def hub_name(name: str) -> str:
    """Returns lm-eval's name of a task.

    Raises:
        EvaluationError: it has none of that name.
    """
    task = task_named(name)
    if task is not None and task.hub is None:
        raise EvaluationError(f"tasks: got {name!r}: lm-eval has no such task{give_data(task)}")
    return (task and task.hub) or name


def give_data(task: Task | None) -> str:
    """Advice for an error of the hub: to give a local file."""
    return f"; give --data DIR with a file {task.name}*{task.suffix}" if task else ""
