"""The commands of the README, run as typed against real servers of the packaged model."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.servers import Process

ROOT = Path(__file__).parents[2]
USE_IT = (ROOT / "README.md").read_text(encoding="utf-8").split("## Use it")[1].split("\n## ")[0]
CONSOLE = [
    [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    for block in re.findall(r"```console\n(.*?)```", USE_IT, re.DOTALL)
]
PYTHON, OFFLINE = re.findall(r"```python\n(.*?)```", USE_IT, re.DOTALL)
TYPED = {"griffin chat": "What does a compiler do?\n\n"}
"""Standard input of a command."""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def arguments(command: str) -> list[str]:
    """Those of a `griffin` command, its comment left out."""
    name, *rest = shlex.split(command, comments=True)
    assert name == "griffin", command
    return rest


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(command: list[str], directory: Path, target: str, typed: str = "") -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "GRIFFIN_TARGET": target, "TERM": "dumb"},
        input=typed,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def loops(text: str) -> bool:
    """Whether four words in a row repeat the words just before them, as in "and, and, and, and"."""
    words = re.findall(r"\w+", text.lower())
    return any(
        words[at : at + 4] == words[at - period : at - period + 4]
        for period in range(1, 5)
        for at in range(period, len(words) - 3)
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: the README's paths exist, and what they write is thrown away."""
    made = tmp_path_factory.mktemp("readme")
    (made / "demo").symlink_to(ROOT / "demo")
    return made


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """The first server of the README."""
    serve = next(line for line in CONSOLE[0] if line.startswith("griffin serve"))
    with Process(*arguments(serve)[1:]) as server:
        yield server.target()


COMMANDS = [
    line for line in CONSOLE[0] if line.startswith("griffin ") and not line.startswith("griffin s")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs_as_typed(command: str, directory: Path, target: str) -> None:
    given = arguments(command)
    typed = TYPED.get(command.partition("  ")[0], "")
    said = run([sys.executable, "-m", "griffin_server", *given], directory, target, typed)
    assert said.strip()
    if given == ["generate", "Why is the sky blue?"]:
        assert "scatter" in said.lower()
        assert not loops(said)


def test_the_python_example_gives_a_sensible_answer(directory: Path, target: str) -> None:
    script = PYTHON.replace("localhost:50051", target)
    assert script != PYTHON
    said = run([sys.executable, "-c", script], directory, target)
    answer, score, choices = said.strip().splitlines()
    # Greedy in bfloat16: how a sentence goes on depends on how many threads there are.
    assert any(word in answer for word in ("light", "energy", "carbon dioxide", "plants"))
    assert not loops(answer)
    logprob, greedy = score.split()
    assert -5 < float(logprob) < 0 and greedy in ("True", "False")
    blue, green = json.loads(choices)
    assert blue > green


def test_the_example_without_a_server_runs_on_half_of_the_neurons(directory: Path) -> None:
    said = run([sys.executable, "-c", OFFLINE], directory, "")
    densities = [float(number) for number in re.findall(r" (\d\.\d+)$", said, re.MULTILINE)]
    assert len(densities) == 2
    assert all(0.5 < density < 0.6 for density in densities)  # the first token is dense


def test_prefill_and_decode_as_the_readme_starts_them(directory: Path) -> None:
    ports = {port: free_port() for port in ("50052", "50053")}
    with ExitStack() as servers:
        started = []
        for line in CONSOLE[1]:
            command = re.sub("|".join(ports), lambda found: ports[found[0]], line)
            server = servers.enter_context(Process(*arguments(command)[1:]))
            started.append(server.target())
        assert started[:2] == [f"127.0.0.1:{port}" for port in ports.values()]
        given = ["generate", "Why is the sky blue?", "--max-tokens", "40"]
        said = run([sys.executable, "-m", "griffin_server", *given], directory, started[-1])
    assert "light" in said


def test_what_loops_is_noticed() -> None:
    assert loops("The sky is and, and, and, and, and")
    assert loops("the answer is the answer is the answer is")
    assert not loops("light is scattered in all directions, and light is absorbed by the air")
