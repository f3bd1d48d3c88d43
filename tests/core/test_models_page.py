"""docs/reference/models.md is what loading does, and the tests that it names are there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "models.md"


def test_the_page_is_made_of_the_tables_that_loading_uses() -> None:
    made = runpy.run_path(str(PAGE.with_name("make_models.py")))["page"]()
    assert PAGE.read_text(encoding="utf-8") == made, "run `make reference`"


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`(tests/\S+::\w+)`", PAGE.read_text(encoding="utf-8"))))
)
def test_a_test_that_the_page_names_is_there(name: str) -> None:
    file, _, function = name.partition("::")
    assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8")
