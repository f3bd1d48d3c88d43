"""The generated reference pages are what the code says, and the tests that they name are there."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from griffin_client import errors as client_errors
from tests.pages import ROOT, read_page

REFERENCE = ROOT / "docs" / "reference"
GENERATORS = sorted(REFERENCE.glob("make_*.py"))


def page_of(generator: Path) -> Path:
    return generator.with_name(f"{generator.stem.removeprefix('make_')}.md")


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda path: path.stem)
def test_a_page_is_what_the_code_says(generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REFERENCE))
    made = runpy.run_path(str(generator))["page"]()
    assert page_of(generator).read_text(encoding="utf-8") == made, "run `make reference`"


def test_the_makefile_writes_each_page() -> None:
    rule = read_page("Makefile").partition("\nreference:")[2].partition("\n\n")[0]
    written = re.findall(r"for page in (.*); do", rule)[0].split()
    assert written == [page_of(generator).stem for generator in GENERATORS]


def test_the_page_on_settings_has_each_flag_of_the_command() -> None:
    command = [sys.executable, "-m", "griffin_server", "serve", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help"}
    assert len(flags) > 20
    page = read_page("docs/reference/settings.md")
    assert flags <= set(re.findall(r"`(--[a-z-]+)`", page))


def test_the_page_on_errors_has_each_exception_of_the_client() -> None:
    page = read_page("docs/reference/errors.md")
    for exception in client_errors.GriffinClientError.__subclasses__():
        assert f"| `{exception.__name__}` | " in page


@pytest.mark.parametrize(
    "name",
    sorted(set(re.findall(r"`(tests/\S+::\w+)`", read_page("docs/reference/models.md")))),
)
def test_a_test_that_the_page_on_models_names_is_there(name: str) -> None:
    file, _, function = name.partition("::")
    assert f"\ndef {function}(" in read_page(file)
