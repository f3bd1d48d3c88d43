"""The page on alerts has an entry for each of them, and the rules link to it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.pages import ROOT, read_page, sections

RULES = ROOT / "deploy" / "prometheus" / "rules"
PAGE = "docs/operations/alerts.md"

ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for file in sorted(RULES.glob("*.yml"))
    for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


def test_the_page_has_an_entry_for_each_alert_and_for_nothing_else() -> None:
    assert list(sections(read_page(PAGE))) == list(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_links_to_its_entry_which_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert rule["annotations"]["runbook"] == f"{PAGE}#{name.lower()}"
    entry = sections(read_page(PAGE))[name]
    assert f"**{rule['labels']['severity'].capitalize()}. " in entry
    assert "\n1. " in entry
