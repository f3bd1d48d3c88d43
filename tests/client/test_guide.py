"""The programs of the guide's page on the Python client, run against a real server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.servers import Running

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "python.md").read_text(encoding="utf-8")

EXAMPLES = {
    f"{section.splitlines()[0]} {number}": code
    for section in PAGE.split("\n## ")[1:]
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL), 1)
}


def test_each_section_has_an_example() -> None:
    assert {name.rpartition(" ")[0] for name in EXAMPLES} == set(
        re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    )
    assert PAGE.count("```") == 2 * len(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(
    name: str,
    tiny_server: Running,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GRIFFIN_TARGET", tiny_server.target)
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed.strip()
    for expected in re.findall(r"print\(.*\)  # (.*)$", EXAMPLES[name], re.MULTILINE):
        assert expected in printed
    with tiny_server.client() as client:
        assert client.list_sessions() == []
