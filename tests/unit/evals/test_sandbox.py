"""Programs that a model wrote: what counts as passed, and what limits end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from griffin_evals.sandbox import ProgramLimits, run_program

SLEEPS = ProgramLimits(wall_s=0.5)
SPINS = ProgramLimits(cpu_s=1, wall_s=60)  # beside others that want CPUs, a second takes longer


def test_a_program_that_runs_to_its_end_passes() -> None:
    verdict = run_program("import math, re, hashlib, threading\nassert math.gcd(4, 6) == 2\n")
    assert (verdict.passed, verdict.reason) == (True, "passed")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'differs'", "AssertionError: differs"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import os; os._exit(0)", "exit status 0 before its end"),
        ("import os; os._exit(4)", "exit status 4 before its end"),
        ("def f(): f()\nf()", "RecursionError"),
        ("x = bytearray(2 << 30)", "MemoryError"),
        ("open('f', 'w').write('x' * (2 << 20))", "File too large"),
        ("input()", "EOFError"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    ],
)
def test_whatever_else_it_does_it_has_not_passed(program: str, reason: str) -> None:
    verdict = run_program(program)
    assert not verdict.passed
    assert reason in verdict.reason


def test_writing_the_word_is_not_passing() -> None:
    tell = (
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'passed')\n except OSError: pass\n"
    )
    assert not run_program(tell + "os._exit(0)").passed


@pytest.mark.parametrize(
    ("program", "limits", "reason"),
    [
        ("while True: pass", SPINS, "more than 1 s of CPU"),
        ("import time; time.sleep(60)", SLEEPS, "still running after 0.5 s"),
        ("import os, time; os.closerange(3, 64); time.sleep(60)", SLEEPS, "still running after"),
    ],
)
def test_an_endless_program_is_ended(program: str, limits: ProgramLimits, reason: str) -> None:
    began = time.monotonic()
    verdict = run_program(program, limits)
    assert not verdict.passed
    assert reason in verdict.reason
    assert time.monotonic() - began < 50


def test_output_goes_nowhere() -> None:
    assert run_program("import sys\nfor _ in range(1000): print('x' * 10000)").passed


@pytest.mark.parametrize(
    "start",
    [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
    ],
)
def test_it_starts_no_process(start: str) -> None:
    verdict = run_program(start)
    assert not verdict.passed
    assert "Operation not permitted" in verdict.reason or "temporarily" in verdict.reason


def test_it_may_start_threads() -> None:
    assert run_program(
        "import threading\nl = []\nt = threading.Thread(target=lambda: l.append(1))\n"
        "t.start(); t.join(); assert l == [1]"
    ).passed


def test_however_deep_it_nests_directories_they_are_removed() -> None:
    deep = "import os\nwhere = os.getcwd()\nfor _ in range(2000): os.mkdir('a'); os.chdir('a')\n"
    verdict = run_program(f"{deep}raise ValueError(where)")
    directory = verdict.reason.removeprefix("ValueError: ")
    assert "griffin-eval-" in directory
    assert not Path(directory).exists()


def test_it_changes_no_file_s_mode_nor_time(tmp_path: Path) -> None:
    (tmp_path / "kept").touch(0o640)
    before = (tmp_path / "kept").stat()
    for change in ("chmod({!r}, 0)", "utime({!r}, (0, 0))", "chown({!r}, 1, 1)"):
        verdict = run_program(f"import os; os.{change.format(str(tmp_path / 'kept'))}")
        assert "Operation not permitted" in verdict.reason
    assert (tmp_path / "kept").stat() == before


def test_it_sends_no_signals_by_descriptor_either() -> None:
    verdict = run_program(
        "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 0)"
    )
    assert "Operation not permitted" in verdict.reason


@pytest.mark.parametrize(
    "signal_target", ["-1", "0", "os.getppid()", pytest.param(str(os.getpid()), id="its starter")]
)
def test_it_sends_no_signals(signal_target: str) -> None:
    verdict = run_program(f"import os; os.kill({signal_target}, 9)")
    assert not verdict.passed
    assert "Operation not permitted" in verdict.reason


def test_it_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        verdict = run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
    assert not verdict.passed
    assert "Operation not permitted" in verdict.reason


def test_it_reaches_no_socket_of_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        verdict = run_program(f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})")
    assert "Operation not permitted" in verdict.reason


def test_it_may_run_coroutines() -> None:
    assert run_program("import asyncio; asyncio.run(asyncio.sleep(0))").passed


def test_it_writes_in_its_own_directory_alone_which_is_removed(tmp_path: Path) -> None:
    own = "import os\nos.mkdir('a'); open('a/b', 'w').write('c')\n"
    assert run_program(
        f"{own}assert os.listdir('.') == ['a']\nos.remove('a/b'); os.rmdir('a')"
    ).passed
    (tmp_path / "kept").write_text("kept")
    for attempt in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(tmp_path / 'kept')!r}, 'w')",
        f"os.remove({str(tmp_path / 'kept')!r})",
    ):
        assert "Permission denied" in run_program(f"import os; {attempt}").reason
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    where = "import os; raise ValueError(os.getcwd())"
    directory = run_program(where).reason.removeprefix("ValueError: ")
    assert "griffin-eval-" in directory
    assert not Path(directory).exists()


def test_it_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "1")
    assert run_program("import os; assert 'A_SECRET' not in os.environ").passed


def test_it_ends_with_the_evaluation() -> None:
    code = (
        "from griffin_evals.sandbox import *\n"
        "run_program('import time; time.sleep(50)', ProgramLimits(wall_s=50))"
    )
    evaluation = subprocess.Popen([sys.executable, "-c", code])
    try:
        children = Path(f"/proc/{evaluation.pid}/task/{evaluation.pid}/children")
        until = time.monotonic() + 20
        started: list[int] = []
        while len(started) < 2 and time.monotonic() < until:
            first = [int(pid) for pid in children.read_text().split()]
            started = [*first, *(p for f in first for p in _children(f))]
    finally:
        evaluation.kill()
        evaluation.wait()
    assert len(started) == 2
    until = time.monotonic() + 10
    while any(_runs(pid) for pid in started) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in started)


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
