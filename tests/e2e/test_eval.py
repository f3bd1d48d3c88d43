"""`griffin eval` as a process: killed and interrupted in the middle, it goes on without doing
anything twice; a server that dies; tasks from a hub that cannot be reached."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from griffin_evals.command import main
from griffin_evals.tasks.errors import EvaluationError
from griffin_evals.tasks.harness import hub_runnable
from tests.servers import Process
from tests.unit.evals.files import PEOPLE, write, write_text

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

HOUSES = 50

OPTIONS: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


def command(where: Sequence[object], data: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "griffin_server", "eval", *map(str, where)),
        *("--data", str(data), "--out", str(out), "--density", "0.5", "--no-speed", *more),
    ]


@contextmanager
def started(asking: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process, ended with the test whatever happens."""
    with subprocess.Popen(asking, **OPTIONS) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def model(tiny_directory: Callable[[str], Path]) -> Path:
    return tiny_directory("llama-long")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """400 questions, and a text of several windows."""
    directory = tmp_path / "data"
    directory.mkdir()
    rows = [
        {
            "query": f"Question: {name} lives in house {number}. Where does {name} live?",
            "choices": [f"In house {number}.", "Nobody has ever asked the moon."],
            "gold": 0,
        }
        for name in PEOPLE
        for number in range(HOUSES)
    ]
    write(directory, "piqa", rows)
    write_text(directory)
    return directory


def lines(out: Path) -> list[str]:
    """Of the journal, whole ones."""
    path = out / "journal" / "answers.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def cells(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "cells").glob("[!.]*.json")}


def until_lines(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Waits until the journal has that many lines."""
    until = time.monotonic() + 200
    while len(lines(out)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_killed_and_interrupted_it_goes_on_and_asks_nothing_twice(
    data: Path, tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "out"
    asking = command(["--model", model], data, out, "--policy", "topk,random")
    with started(asking) as killed:
        until_lines(killed, out, 900)  # dense is done, and part of topk
        killed.kill()
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    after_kill, cells_after_kill = lines(out), cells(out)
    assert len(after_kill) < 1600  # in the middle
    assert len(cells_after_kill) == 1

    with started(asking) as interrupted:
        until_lines(interrupted, out, len(after_kill) + 100)
        interrupted.send_signal(signal.SIGINT)
        _, said = interrupted.communicate()
    assert interrupted.returncode == 130
    assert "griffin: stopped: " in said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert lines(out)[: len(after_kill)] == after_kill
    after_interrupt = lines(out)
    assert len(after_interrupt) < 2300

    done = subprocess.run(asking, check=True, **OPTIONS)
    assert "results.md" in done.stdout
    keys = Counter(json.loads(line)["key"] for line in lines(out))
    assert set(keys.values()) == {1}  # no request was answered twice
    assert lines(out)[: len(after_interrupt)] == after_interrupt
    for name, content in cells_after_kill.items():
        assert cells(out)[name] == content

    whole = tmp_path / "whole"
    again = command(["--model", model], data, whole, "--policy", "topk,random")
    assert main(again[4:]) == 0  # in this process, where everything is imported
    assert len(keys) == len(lines(whole))  # and none is missing
    assert cells(out).keys() == cells(whole).keys()
    for name, content in cells(out).items():
        one, other = json.loads(content), json.loads(cells(whole)[name])
        for measure, values in one["measures"].items():
            assert values["value"] == pytest.approx(other["measures"][measure]["value"], rel=1e-3)


def test_a_server_that_is_gone_for_good_is_named_and_what_is_done_stays(
    data: Path, tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "out"
    serving = ["--model", str(model), "--density", "1", "--dtype", "float32"]
    server = Process(*serving)
    with server:
        target = server.target()
        asking = command(["--target", target], data, out, "--tasks", "piqa", "--wait-s", "2")
        with started(asking) as left_alone:
            until_lines(left_alone, out, 900)
            server.kill()
            _, said = left_alone.communicate()
    assert left_alone.returncode == 1
    assert "Traceback" not in said
    last = said.strip().split("\n")[-1]
    assert last.startswith("griffin: ")
    assert target in last
    assert f"what is done is kept in {out}" in last
    assert len(cells(out)) == 1
    before = lines(out)

    with Process(*serving, GRIFFIN_PORT=target.rsplit(":", 1)[1]) as server:
        server.target()
        subprocess.run(asking, check=True, **OPTIONS)
    assert lines(out)[: len(before)] == before
    assert set(Counter(json.loads(line)["key"] for line in lines(out)).values()) == {1}
    assert len(cells(out)) == 2


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # lm-eval's
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_the_hub_a_task_says_what_to_give() -> None:
    manager = TaskManager()
    with pytest.raises(EvaluationError, match=r"^piqa: its data .* --data DIR with a file piqa\*"):
        hub_runnable("piqa", manager)
    with pytest.raises(EvaluationError, match="got 'sudoku'; allowed: what lm_eval ls tasks lists"):
        hub_runnable("sudoku", manager)
