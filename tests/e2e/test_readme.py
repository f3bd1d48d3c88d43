"""The commands of the README and of the guide, run as typed against a real server, and programs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.pages import loops, run, run_griffin
from tests.pages import ROOT, arguments, code_blocks, commands, read_page
from tests.servers import Process

README = read_page("README.md")
((SERVE, *SHORT_LIST),) = commands(README)
((_, *LONG_LIST),) = commands(read_page("docs/guide/commands.md"))
COMMANDS = list(dict.fromkeys((*SHORT_LIST, *LONG_LIST)))
(PROGRAM,) = code_blocks(README, "python")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: the README's paths exist, and what they write is thrown away."""
    made = tmp_path_factory.mktemp("readme")
    (made / "demo").symlink_to(ROOT / "demo")
    return made


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with Process(*arguments(SERVE)[1:]) as server:
        yield server.target()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_typed(command: str, directory: Path, target: str) -> None:
    said = run_griffin(command, directory, target)
    assert said.strip()
    if command.endswith('sky blue?"'):
        assert "scatter" in said.lower()
    if command in SHORT_LIST and "generate" in command:
        assert not loops(said)


def test_the_python_example_gives_a_sensible_answer(directory: Path, target: str) -> None:
    program = PROGRAM.replace("localhost:50051", target)
    assert program != PROGRAM
    answer = run([sys.executable, "-c", program], directory, target)
    # Greedy in bfloat16: how a sentence goes on depends on how many threads there are.
    assert any(word in answer for word in ("light", "energy", "carbon dioxide", "plants"))
    assert not loops(answer)


def test_the_batch_without_a_server_runs_on_half_of_the_neurons(directory: Path) -> None:
    program = code_blocks(read_page("docs/guide/offline.md"), "python")[0]
    said = run([sys.executable, "-c", program], directory, "")
    densities = [float(number) for number in re.findall(r" (\d\.\d+)$", said, re.MULTILINE)]
    assert len(densities) == 2
    assert all(0.5 < density < 0.6 for density in densities)  # the first token is dense


def test_what_loops_is_noticed() -> None:
    assert loops("The sky is and, and, and, and, and")
    assert loops("the answer is the answer is the answer is")
    assert not loops("light is scattered in all directions, and light is absorbed by the air")
