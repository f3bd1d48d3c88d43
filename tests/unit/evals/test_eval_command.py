"""`griffin eval` on a tiny model: all tasks, what it writes, and nothing done twice."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from griffin_evals.command import task_table
from griffin_evals.tasks import TASKS
from griffin_server.commands import app
from tests.servers import Running
from tests.unit.evals.files import GOOD, write, write_text

ROOT = Path(__file__).parents[3]


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file for every task."""
    directory = tmp_path / "data"
    directory.mkdir()
    for task, layouts in GOOD.items():
        write(directory, task, layouts[0])
    write_text(directory)
    return directory


def journal(out: Path) -> Counter[str]:
    lines = (out / "journal" / "answers.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["key"] for line in lines)


def cells(out: Path) -> list[dict[str, Any]]:
    (group,) = json.loads((out / "results.json").read_text())["groups"]
    return list(group["cells"])


def test_every_task_is_run_with_every_setting(
    data: Path, tmp_path: Path, tiny_directory: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    model = tiny_directory("llama-long")
    status, printed, err = run(
        *("--model", model, "--data", data, "--out", out, "--run-code", "--limit", 1),
        *("--density", "1", "0.5", "--no-speed"),
        *("--mode", "generation", "classification"),
    )
    assert status == 0, err
    made = {(c["task"], c["setting"]["policy"], c["setting"]["mode"]) for c in cells(out)}
    for task in TASKS:
        modes = ["generation", "classification"] if task.choices_only else ["generation"]
        expected = {(task.name, "topk", mode) for mode in modes}
        expected.add((task.name, "dense", "generation"))
        assert {each for each in made if each[0] == task.name} == expected
    assert ("divergence", "topk", "generation") in made
    for cell in cells(out):
        assert cell["n"] == 1
        assert next(iter(cell["measures"]))
    piqa = next(c for c in cells(out) if (c["task"], c["setting"]["policy"]) == ("piqa", "topk"))
    assert 0 < piqa["figures"]["mean_norm_mass"] < 1
    assert piqa["figures"]["versions"]["lm-eval"].startswith("0.4.")
    for file in printed.split():
        assert Path(file).exists()
    assert "piqa topk 0.5 classification: acc" in err


def test_the_same_command_again_asks_nothing_and_another_one_only_what_is_new(
    data: Path, tmp_path: Path, tiny_directory: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    model = tiny_directory("llama")
    given = ["--model", model, "--data", data, "--out", out, "--tasks", "piqa", "--no-speed"]
    assert run(*given, "--density", 0.5)[0] == 0
    first = journal(out)
    results = cells(out)
    assert run(*given, "--density", 0.5)[0] == 0
    assert journal(out) == first
    assert cells(out) == results
    assert run(*given, "--density", "0.5,0.25")[0] == 0
    assert set(journal(out).values()) == {1}
    assert len(journal(out)) == len(first) * 3 // 2  # dense and 0.5 before, 0.25 now


@pytest.mark.parametrize("change", ["limit", "seed", "data", "model"])
def test_cells_of_other_settings_are_not_used(
    change: str, data: Path, tmp_path: Path, tiny_directory: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    given = {"--model": tiny_directory("llama"), "--limit": 4, "--seed": 0}
    rest = ["--data", data, "--out", out, "--tasks", "piqa", "--density", 0.5, "--no-speed"]

    def command() -> list[object]:
        return [*(word for pair in given.items() for word in pair), *rest, "--policy", "random"]

    assert run(*command())[0] == 0
    before = len(list((out / "cells").iterdir()))
    match change:
        case "limit":
            given["--limit"] = 3
        case "seed":
            given["--seed"] = 1
        case "data":
            write(data, "piqa", GOOD["piqa"][0][::-1])
        case "model":
            given["--model"] = tiny_directory("qwen2")
    assert run(*command())[0] == 0
    assert len(list((out / "cells").iterdir())) == 2 * before


def test_a_task_that_a_model_refuses_is_left_out_and_the_others_go_on(
    data: Path, tmp_path: Path, tiny_directory: Callable[[str], Path]
) -> None:
    """Its windows are longer than the model's context."""
    out = tmp_path / "out"
    status, printed, err = run(
        *("--model", tiny_directory("llama"), "--data", data, "--out", out, "--no-speed"),
        *("--tasks", "wikitext", "piqa", "--density", 0.5, "--limit", 2),
    )
    assert status == 1
    assert "left out: " in err and "wikitext" in err and "tokens" in err
    assert {(c["task"], c["setting"]["policy"]) for c in cells(out)} == {
        ("piqa", "dense"),
        ("piqa", "topk"),
    }
    assert str(out / "results.md") in printed


def test_a_task_with_a_limit_of_its_own_stands_beside_the_others(
    data: Path, tmp_path: Path, tiny_directory: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    given = ["--model", tiny_directory("llama-long"), "--data", data, "--out", out, "--no-speed"]
    given += ["--tasks", "piqa,wikitext,boolq", "--density", 0.5]
    status, _, err = run(*given, "--limit", "6", "wikitext=1,BoolQ=2")
    assert status == 0, err
    sizes = {cell["task"]: cell["n"] for cell in cells(out)}
    assert sizes == {"piqa": 6, "boolq": 2, "wikitext": 1, "divergence": 1}
    before = journal(out)
    status, _, err = run(*given, "--limit", "6", "--limit", "wikitext=1", "--limit", "boolq=3")
    assert status == 0, err
    assert {cell["task"]: cell["n"] for cell in cells(out)} == {**sizes, "boolq": 3}
    assert sum((journal(out) - before).values()) == 4  # two choices of one document, dense and not


def test_a_running_server_gives_what_the_model_gives_in_process(
    data: Path, tmp_path: Path, tiny_directory: Callable[[str], Path], tiny_server: Running
) -> None:
    values = []
    for where in (["--target", tiny_server.target], ["--model", tiny_directory("llama")]):
        out = tmp_path / where[0]
        status, _, err = run(
            *where, "--data", data, "--out", out, "--tasks", "copa,lambada", "--density", 0.5
        )
        assert status == 0, err
        # The server has 256 tokens of context, and no tokenizer was named to cut the prompt with.
        assert ("tokens a second are not measured" in err) == (where[0] == "--target")
        values.append(
            {
                (c["task"], c["setting"]["policy"], name): (m["value"], c["identity_way"])
                for c in ({**c, "identity_way": c["way"]} for c in cells(out))
                for name, m in c["measures"].items()
                if c["task"] != "speed"
            }
        )
    served, here = values
    assert served.keys() == here.keys()
    for key, (value, way) in served.items():
        assert (way, here[key][1]) == ("server", "in process")
        assert value == pytest.approx(here[key][0], rel=1e-4)


def test_tokens_a_second_are_measured_for_each_setting(
    data: Path, tmp_path: Path, tiny_directory: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    model = tiny_directory("llama-long")
    given = ["--model", model, "--data", data, "--out", out, "--tasks", "copa", "--density", 0.5]
    assert run(*given)[0] == 0
    rates = [c for c in cells(out) if c["task"] == "speed"]
    assert {c["setting"]["policy"] for c in rates} == {"dense", "topk"}
    assert all(c["measures"]["tokens_per_second"]["value"] > 0 for c in rates)
    assert "one request at a time" in (out / "results.md").read_text()


def test_models_stand_one_after_the_other_each_with_its_pictures(
    data: Path, tmp_path: Path, tiny_directory: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    models = sorted((tiny_directory("llama"), tiny_directory("opt")), key=str)  # as a report does
    given = [word for model in models for word in ("--model", model)]
    status, printed, err = run(
        *given, "--data", data, "--out", out, "--tasks", "copa,arc-c", "--no-speed"
    )
    assert status == 0, err
    groups = json.loads((out / "results.json").read_text())["groups"]
    assert [group["title"].split(",")[0] for group in groups] == [str(model) for model in models]
    pictures = [Path(line).name for line in printed.split() if line.endswith(".png")]
    assert pictures == [
        f"{model.name}-{number}-generation{tasks}.png"
        for number, model in enumerate(models)
        for tasks in ("", "-tasks")
    ]
    for group in groups:
        assert {mean["density"] for mean in group["means"]} == {1.0, 0.75, 0.5}
        assert group["means"][0]["tasks"] == ["arc_challenge", "copa"]


def test_a_report_is_made_again_from_the_cells_alone(
    data: Path, tmp_path: Path, tiny_directory: Callable[[str], Path]
) -> None:
    out = tmp_path / "out"
    model = tiny_directory("llama")
    run("--model", model, "--data", data, "--out", out, "--tasks", "copa", "--no-speed")
    tables = (out / "results.md").read_text()
    for file in out.glob("results.*"):
        file.unlink()
    status, printed, _ = run("--report", out)
    assert status == 0
    assert (out / "results.md").read_text() == tables
    assert str(out / "results.json") in printed


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--tasks", "piqa"], 2, "--out: got none"),
        (["--out", "OUT"], 2, "--tasks: got none"),
        (["--out", "OUT", "--data", "missing"], 2, "--data: got missing; allowed: a directory"),
        (["--out", "OUT", "--density", "0"], 2, "got '0'; allowed: numbers in (0, 1]"),
        (["--out", "OUT", "--density", "half"], 2, "got 'half'"),
        (["--out", "OUT", "--policy", "best"], 2, "got 'best'; allowed: topk, sampled"),
        (["--out", "OUT", "--mode", "both"], 2, "got 'both'; allowed: generation, classification"),
        (["--out", "OUT", "--limit", "0"], 2, "got '0'; allowed: a whole number, >= 1"),
        (["--out", "OUT", "--limit", "=3"], 2, "got '=3'; allowed: N or TASK=N"),
        (["--out", "OUT", "--limit", "piqa=x"], 2, "got 'x'; allowed: a whole number, >= 1"),
        (
            ["--out", "OUT", "--data", "DATA", "--tasks", "copa,arc-e", "--limit", "piqa=3"],
            2,
            "--limit: got piqa=3; allowed: copa, arc_easy",
        ),
        (["--out", "OUT", "--seed", "-1"], 2, "got '-1'"),
        (["--out", "OUT", "--data", "DATA", "--tokenizer", "a"], 2, "without --target"),
        (["--out", "OUT", "--data", "DATA", "--tasks", "sudoku"], 1, "got 'sudoku'; allowed with"),
        (["--out", "OUT", "--data", "DATA", "--tasks", "human_eval"], 1, "allowed with --run-code"),
        (["--out", "OUT", "--data", "EMPTY"], 1, "found no file for a task"),
        (["--out", "OUT", "--tasks", "xsum"], 1, "no such task; give --data DIR with a file xsum*"),
        (["--report", "EMPTY"], 1, "holds no cells"),
        (["--out", "OUT", "--data", "DATA", "--model", "./none"], 1, "./none"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    arguments: list[str], status: int, words: str, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"OUT": tmp_path / "out", "DATA": data, "EMPTY": tmp_path / "empty"}
    got, _, err = run(*(places.get(argument, argument) for argument in arguments))
    assert got == status
    assert words in re.sub(r"\s+", " ", err)
    assert not list(tmp_path.glob("out/cells/*"))


def test_a_wrong_line_is_found_before_the_model_is_loaded(data: Path, tmp_path: Path) -> None:
    write(data, "piqa", [*GOOD["piqa"][0], {"query": "a", "choices": ["b", "c"], "gold": 7}])
    status, _, err = run("--model", "./none", "--data", data, "--out", tmp_path / "out")
    assert status == 1
    assert "piqa_small.jsonl, line 9, column gold: found 7; allowed: an index of the 2" in err


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "griffin_evals.command", None)
    status, _, err = run("--list")
    assert status == 1
    assert "pip install 'griffin-serving[eval]'" in err


def test_the_list_is_what_the_documentation_has() -> None:
    status, printed, _ = run("--list")
    assert status == 0
    assert printed.strip() == task_table()
    assert task_table() in (ROOT / "docs" / "reference" / "evaluation.md").read_text()
