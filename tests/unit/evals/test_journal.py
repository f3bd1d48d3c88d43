"""The journal: what it keeps when its process is killed, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from griffin_evals.errors import JournalError
from griffin_evals.journal import Journal


def test_values_are_there_for_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.jsonl"
    with Journal(path) as journal:
        assert journal.get("a") is None
        journal.put("a", {"text": "line\nbreak é", "logprob": -0.1})
        journal.put("b", 1)
        journal.put("a", 2)
    with Journal(path) as journal:
        assert (journal.get("a"), journal.get("b"), len(journal)) == (2, 1, 2)


@pytest.mark.parametrize("torn", [1, 5, 20])
def test_a_last_line_that_was_cut_off_is_dropped_and_the_next_one_starts_a_line(
    torn: int, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path) as journal:
        journal.put("a", 1)
        journal.put("b", 2)
    path.write_bytes(path.read_bytes()[:-torn])
    with Journal(path) as journal:
        assert (journal.get("a"), journal.get("b")) == (1, None)
        journal.put("c", 3)
    with Journal(path) as journal:
        assert (journal.get("a"), journal.get("b"), journal.get("c")) == (1, None, 3)


def test_a_process_that_is_killed_loses_nothing_that_it_has_put(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    program = (
        "import sys; from griffin_evals.journal import Journal\n"
        f"journal = Journal({str(path)!r})\n"
        "for number in range(10**9): journal.put(str(number), number); print(number, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        said += map(int, process.stdout.read().splitlines())
    with Journal(path) as journal:
        assert all(journal.get(str(number)) == number for number in said)


def test_a_line_in_the_middle_that_is_none_of_a_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"key": "a", "value": 1}\n{"key": "b"}\n{"key": "c", "value": 3}\n')
    with pytest.raises(JournalError, match=r"run\.jsonl:2: is not a line of a journal"):
        Journal(path)


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize(
    "content", ['{"results": {"piqa": 0.7}}', '["key", "value"]', "a note", '{"results": {']
)
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_was(
    content: str, end: str, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    path.write_text(content + end)
    with pytest.raises(JournalError, match=r"results\.json:1: is not a line of a journal"):
        Journal(path)
    assert path.read_text() == content + end


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "run.jsonl"):
        with pytest.raises(JournalError, match=f"{path}: cannot be opened: "):
            Journal(path)


def test_after_a_line_that_the_disk_had_no_room_for_others_may_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    with Journal(tmp_path / "run.jsonl") as journal:
        journal.put("a", 1)
        monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:12]))
        with pytest.raises(OSError, match="written in part"):
            journal.put("b", 2)
        assert journal.get("b") is None
        monkeypatch.undo()
        journal.put("c", 3)
    with Journal(tmp_path / "run.jsonl") as journal:
        assert (journal.get("a"), journal.get("b"), journal.get("c")) == (1, None, 3)


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "run.jsonl"),
        pytest.raises(JournalError, match="another process or journal has it open"),
    ):
        Journal(tmp_path / "run.jsonl")
    Journal(tmp_path / "run.jsonl").close()
