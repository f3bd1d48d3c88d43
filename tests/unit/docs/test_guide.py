"""The programs on the pages of the guide, run against a real server."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pages import ROOT, code_blocks, read_page, sections
from tests.servers import Running

PAGES = sorted((ROOT / "docs" / "guide").glob("*.md"))

EXAMPLES = {
    f"{page.stem}, {title} {number}": code
    for page in PAGES
    if page.stem != "offline"  # its programs call no server
    for title, text in sections(f"\n## top\n{page.read_text(encoding='utf-8')}").items()
    for number, code in enumerate(code_blocks(text, "python"), 1)
}


def test_each_section_on_the_python_client_has_an_example() -> None:
    page = read_page("docs/guide/python.md")
    for title, text in sections(page).items():
        assert code_blocks(text, "python"), title
    assert page.count("```") == 2 * len(code_blocks(page, "python"))


def test_programs_are_found_on_several_pages() -> None:
    assert len({name.partition(",")[0] for name in EXAMPLES}) >= 5


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


def test_the_examples_without_a_server_run(
    tiny_directory: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_directory("llama"))
    batch, hooks = code_blocks(read_page("docs/guide/offline.md"), "python")
    for code, name in (
        (batch, "smollm2-135m-instruct"),
        (hooks, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ):
        assert name in code
        exec(compile(code.replace(name, model), "offline.md", "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out.strip()
