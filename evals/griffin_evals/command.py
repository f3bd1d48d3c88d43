"""``griffin eval``: measures what pruning costs on tasks, and writes tables and plots."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from griffin_core.errors import GriffinError
from griffin_core.spec.choices import DEFAULT_MODEL, ScoreMode
from griffin_evals.bar import Bar
from griffin_evals.cells import Setting
from griffin_evals.errors import EvalError
from griffin_evals.plan import Plan, Source
from griffin_evals.recipes import ALLOWED, parse_recipe
from griffin_evals.tasks import TASKS, hub_name, local_task, task_named
from griffin_evals.tasks.columns import Row
from griffin_evals.tasks.data import LocalData, file_of, files_of, read
from griffin_evals.tasks.errors import BadDataFile, EvaluationError

MODES = get_args(ScoreMode)
DTYPES = ("float32", "bfloat16", "float16")

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses."""

SETTING = argparse.ArgumentTypeError


def _one_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        given = _listed(text)
        if wrong := [each for each in given if each not in allowed]:
            raise SETTING(f"got {wrong[0]!r}; allowed: {', '.join(allowed)}")
        return given

    return parse


def _listed(text: str) -> list[str]:
    given = [each.strip() for each in text.split(",") if each.strip()]
    if not given:
        raise SETTING(f"got {text!r}; allowed: a name, or several with commas between them")
    return given


def _densities(text: str) -> list[float]:
    try:
        given = [float(each) for each in _listed(text)]
    except ValueError:
        given = [math.nan]
    if not all(0 < each <= 1 for each in given):
        raise SETTING(f"got {text!r}; allowed: numbers in (0, 1]")
    return given


def _number(least: int, most: int | None = None) -> Callable[[str], int]:
    allowed = f">= {least}" if most is None else f"{least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise SETTING(f"got {text!r}; allowed: a whole number, {allowed}")
        return value

    return parse


def _limits(text: str) -> list[tuple[str, int]]:
    """Parses pairs of a task and its limit; the task is "" for the limit of all tasks."""
    limits = []
    for each in _listed(text):
        task, sign, most = (part.strip() for part in each.rpartition("="))
        if sign and not task:
            raise SETTING(f"got {each!r}; allowed: N or TASK=N")
        limits.append((task, _number(1)(most)))
    return limits


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise SETTING(f"got {text!r}; allowed: a number >= 0")
    return value


class Flatten(argparse.Action):
    """Collects values from repeated options, several arguments and comma-separated lists."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*before, *(each for value in values for each in value)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="griffin eval",
        description="Runs tasks with the dense model and with every density and policy, and writes "
        "plots and tables with standard errors. The same command resumes an interrupted run.",
        epilog="Tasks are lm-eval's own from the hub or, with --data, local files; see --list.",
        allow_abbrev=False,
    )

    def several(name: str, of: Callable[[str], Any], **options: Any) -> None:
        parser.add_argument(name, nargs="+", type=of, action=Flatten, **options)

    several(
        "--model",
        _listed_one,
        metavar="NAME",
        help="models to run in this process: a directory, a .gguf file or a hub id; "
        f"{DEFAULT_MODEL} if neither --model nor --target is given",
    )
    several("--target", _listed_one, metavar="HOST:PORT", help="running servers")
    several(
        "--tasks", _listed, help="task names; with --data the default is all tasks that have files"
    )
    several("--density", _densities, help="default 0.75 0.5; density 1 is always run")
    several("--policy", _recipes, help=f"{ALLOWED}; default topk")
    several(
        "--mode",
        _one_of(MODES),
        help="for multiple choice: with generation (the default) the question chooses the experts "
        "and the answer runs on them; with classification only the last token that is run uses "
        "experts, which all earlier tokens choose, as in the paper's tables",
    )
    several(
        "--limit",
        _limits,
        metavar="N",
        help="the most documents of each task; TASK=N sets a limit for one task",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="directory with a local file for each task"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory for results; an interrupted run in it is resumed",
    )
    parser.add_argument(
        "--seed",
        type=_number(0, 2**64 - 1),
        default=0,
        help="seed for policies that draw at random (0)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="data type of --model (float32)",
    )
    parser.add_argument(
        "--device", help="device of --model: cpu, cuda or cuda:N; default: the first GPU if any"
    )
    parser.add_argument("--threads", type=_number(1), help="CPU threads of --model")
    parser.add_argument(
        "--tokenizer",
        help="tokenizer of the --target's model: truncates long texts, and lets lm-eval's own "
        "wikitext run",
    )
    parser.add_argument(
        "--concurrency", type=_number(1), default=32, help="number of requests at once (32)"
    )
    parser.add_argument(
        "--wait-s",
        type=_seconds,
        default=300.0,
        help="seconds to wait for a server that cannot be reached (300)",
    )
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="allow human_eval, which runs programs that the model writes, in a sandbox",
    )
    parser.add_argument("--no-speed", action="store_true", help="do not measure tokens per second")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="only write the tables and plots of DIR again",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the tasks and the columns of their data files"
    )
    return parser


def _listed_one(text: str) -> list[str]:
    if not text:
        raise SETTING("got an empty text; allowed: a name")
    return [text]


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Returns its exit status: 0 for success, 1 if an error ended the run or a
    task was left out, 2 for wrong options, 130 for Ctrl-C."""
    parser = _parser()
    err = Console(stderr=True, highlight=False)
    bar = Bar(err)
    kept = ""
    try:
        given = parser.parse_args(arguments)
        if given.list:
            print(task_table())
            return DONE
        if given.report:
            return _report(given.report)
        plan = _checked(parser, given)
        kept = f"; what is done is kept in {plan.out}"
        # Imported here since it loads torch and lm-eval, so that a wrong file is reported at once.
        from griffin_evals.run import run  # noqa: PLC0415

        left_out = run(plan, bar, lambda text: err.print(text, markup=False, soft_wrap=True))
        status = _report(plan.out)
        for sentence in left_out:
            _say(err, f"left out: {sentence}")
        return FAILED if left_out else status
    except SystemExit as end:  # from the parser, which has printed the reason
        return int(end.code or 0)
    except KeyboardInterrupt:
        done = f"{bar.done} of {bar.total} cells are done" if bar.total else "nothing was run"
        _say(err, f"stopped: {done}; the same command goes on from there")
        return INTERRUPTED
    except (EvalError, GriffinError, OSError) as error:
        _say(err, f"{error}{kept}")
        return FAILED


def _say(err: Console, message: str) -> None:
    err.print(f"griffin: {message}", markup=False, soft_wrap=True)


def _report(out: Path) -> int:
    from griffin_evals.report import write_report  # noqa: PLC0415  # brings matplotlib

    for path in write_report(out):
        print(path)
    return DONE


def _checked(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Plan:
    """Returns the plan for these options. It checks everything that needs no model, data files
    included."""
    if given.out is None:
        parser.error("--out: got none; allowed: a directory for results")
    if given.data is None and not given.tasks:
        parser.error("--tasks: got none; allowed: lm-eval's names, or none with --data DIR")
    if given.data is not None and not given.data.is_dir():
        parser.error(f"--data: got {given.data}; allowed: a directory")
    if given.tokenizer and not given.target:
        parser.error("--tokenizer: got one without --target; allowed: for servers")
    data: dict[str, LocalData] | None = None
    if given.data is not None:
        data = _local_data(given.data, given.tasks, given.run_code)
        tasks = list(data)
    else:
        tasks = list(dict.fromkeys(given.tasks))
        for name in tasks:
            hub_name(name)  # raises
    limits = _task_limits(parser, given.limit or [], tasks)
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.model and not given.target:
        given.model = [DEFAULT_MODEL]

    return Plan(
        sources=[
            *(Source(model=name) for name in dict.fromkeys(given.model or [])),
            *(Source(target=target) for target in dict.fromkeys(given.target or [])),
        ],
        tasks=tasks,
        data=data,
        settings=_settings(given),
        out=given.out,
        limit=limits.pop("", None),
        limits=limits,
        seed=given.seed,
        dtype=given.dtype,
        speed=not given.no_speed,
        tokenizer=given.tokenizer,
        concurrency=given.concurrency,
        wait_s=given.wait_s,
        threads=given.threads,
        device=given.device,
    )


def _task_limits(
    parser: argparse.ArgumentParser, given: Sequence[tuple[str, int]], tasks: Sequence[str]
) -> dict[str, int]:
    """Returns limits by the name under which a task is run; the limit of all other tasks is under
    ""."""
    limits: dict[str, int] = {}
    for name, most in given:
        known = task_named(name)
        same = [task for task in tasks if task == name or (known and task_named(task) is known)]
        if name and not same:
            parser.error(f"--limit: got {name}={most}; allowed: {', '.join(tasks)}")
        limits |= dict.fromkeys(same or [""], most)
    return limits


def _recipes(text: str) -> list[str]:
    """Reads names of recipes with commas between them."""
    given = _listed(text)
    for name in given:
        try:
            parse_recipe(name)
        except ValueError as error:
            raise SETTING(str(error)) from error
    return given


def _settings(given: argparse.Namespace) -> list[Setting]:
    """Returns all combinations of mode, density and policy, without density 1, which is always
    run."""
    densities = sorted(set(given.density or [0.75, 0.5]), reverse=True)
    return [
        Setting(mode=mode, density=density, policy=policy)
        for mode in dict.fromkeys(given.mode or ["generation"])
        for density in densities
        for policy in dict.fromkeys(given.policy or ["topk"])
        if density < 1
    ]


def _local_data(
    directory: Path, names: Sequence[str] | None, run_code: bool
) -> dict[str, LocalData]:
    """Reads the local data of tasks, and checks it line by line.

    Raises:
        EvaluationError: a task is unknown, has no file or an invalid one, or needs --run-code.
    """
    if names:
        tasks = list(dict.fromkeys(local_task(name) for name in names))
    else:
        tasks = [task for task in TASKS if files_of(task, directory)]
        tasks = [task for task in tasks if run_code or task.kind != "program"]
        if not tasks:
            allowed = ", ".join(f"{task.name}*{task.suffix}" for task in TASKS)
            raise BadDataFile(f"{directory}: found no file for a task; allowed: {allowed}")
    for task in tasks:
        if task.kind == "program" and not run_code:
            raise EvaluationError(
                f"{task.name}: it runs programs that the model writes; allowed with --run-code"
            )
    paths = [(task, file_of(task, directory)) for task in tasks]
    return {task.name: read(task, path) for task, path in paths}


def task_table() -> str:
    """Returns the tasks as a Markdown table."""
    lines = [
        "| task | file | columns of a line | measures | lm-eval's own |",
        "|---|---|---|---|---|",
    ]
    for task in TASKS:
        layouts = "; or ".join(_columns(row) for row in task.rows) or "a text, UTF-8"
        measures = ", ".join(metric.name for metric in task.metrics)
        file = f"`{task.name}*{task.suffix}`"
        lines.append(f"| {task.name} | {file} | {layouts} | {measures} | {task.hub or 'none'} |")
    return "\n".join(lines)


def _columns(row: type[Row]) -> str:
    return ", ".join(f"`{name}`" for name in row.columns())
