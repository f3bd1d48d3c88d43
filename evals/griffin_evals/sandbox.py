"""Runs a program that a model wrote, in its own process with limits.

Two processes are started for each program. The first (``sandbox_child``) isolates itself from the
network and from other processes as far as the kernel allows, starts the program, and ends it and
all processes that it has started. The program starts in an empty directory, which is removed
afterwards; it may read everything that the user may read, and write only there. This protects
against a model's mistakes, but not against programs that are written to do harm.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp

CHILD = Path(__file__).with_name("sandbox_child.py")

GRACE_S = 10.0
"""The seconds that the first process has in addition to the program's own time, to start and clean
up."""


@dataclass(frozen=True, kw_only=True)
class ProgramLimits:
    """The resources that a program may use.

    Args:
        cpu_s: CPU seconds.
        wall_s: wall-clock seconds, for programs that sleep.
        memory_bytes: the size of its address space.
        file_bytes: the size of the largest file that it writes.
    """

    cpu_s: int = 5
    wall_s: float = 30.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a program ended.

    Args:
        passed: whether it ran to its end.
        reason: in a few words, why it did not pass; "passed" if it did.
    """

    passed: bool
    reason: str


@contextmanager
def _own_directory() -> Iterator[str]:
    """Creates an empty directory, and removes it afterwards with all of its contents."""
    directory = mkdtemp(prefix="griffin-eval-")
    try:
        yield directory
    finally:
        # shutil.rmtree is recursive, and a program can nest directories deeper than it can follow.
        subprocess.run(["rm", "-rf", directory], stderr=subprocess.DEVNULL, check=False)


def run_program(program: str, limits: ProgramLimits | None = None) -> Verdict:
    """Runs Python source. It passes if it runs to its end; an exception, an exit (whatever its
    status) or anything above the limits means that it does not."""
    limits = limits or ProgramLimits()
    token = secrets.token_hex(16)  # the child sends the token only if the program ran to its end
    task = json.dumps({"program": program, "token": token, **asdict(limits)})
    with _own_directory() as directory:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"PATH": "/usr/bin:/bin", "HOME": directory, "TMPDIR": directory},
            start_new_session=True,  # Ctrl-C ends the evaluation, which then ends this process
        )
        try:
            answer, _ = child.communicate(task.encode(), timeout=limits.wall_s + GRACE_S)
        except subprocess.TimeoutExpired:
            answer = b""
        finally:
            child.kill()
            child.wait()
    try:
        said = json.loads(answer)
    except ValueError:
        return Verdict(passed=False, reason="the sandbox was ended")
    passed = said["token"] == token
    reason = "passed" if passed else said["reason"]
    return Verdict(passed=passed, reason=reason)
