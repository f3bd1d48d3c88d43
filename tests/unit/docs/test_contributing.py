"""What CONTRIBUTING and the release recipe say holds."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from tests.pages import ROOT, read_page, sections

HOW_TO = sections(read_page("CONTRIBUTING.md"))["How to add something"]
RECIPES = {part.splitlines()[0]: part for part in HOW_TO.split("\n### ")[1:]}

MAX_FILES = 5
"""The most files that are written by hand for one of these things."""


def files(text: str) -> set[str]:
    """The files and directories of the repository that a text names."""
    roots = "griffin_core|server|client|protos|tests|deploy|docs"
    return set(re.findall(rf"`((?:{roots})/[\w./]+)`", text))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_few_steps(name: str) -> None:
    steps = re.findall(r"^(\d)\. ", RECIPES[name], re.MULTILINE)
    assert 1 <= len(steps) <= MAX_FILES
    assert files(RECIPES[name])


def test_a_parameter_of_a_policy_is_in_the_files_of_its_recipe_and_in_no_other() -> None:
    sources = [
        path
        for root in ("griffin_core", "server", "client", "protos")
        for path in (ROOT / root).rglob("*")
        if path.suffix in (".py", ".proto") and "_pb2" not in path.name
    ]
    found = {str(path.relative_to(ROOT)) for path in sources if "topk_share" in path.read_text()}
    assert found == files(RECIPES["A parameter of a policy"])


def test_the_files_that_recipes_name_are_there() -> None:
    assert not {file for file in files(HOW_TO) if not (ROOT / file).exists()}


def test_each_verb_that_the_pages_name_is_in_the_makefile() -> None:
    verbs = set(re.findall(r"^([a-z0-9-]+):", read_page("Makefile"), re.MULTILINE))
    pages = ("README.md", "CONTRIBUTING.md", "docs/guide/commands.md", "docs/guide/density.md")
    for page in pages:
        for verb in re.findall(r"`make ([a-z0-9-]+)", read_page(page)):
            assert verb in verbs, f"{page}: make {verb}"


def test_the_changelog_begins_with_what_is_unreleased_and_then_has_this_version() -> None:
    version = tomllib.loads(read_page("pyproject.toml"))["project"]["version"]
    headings = re.findall(r"^## \[(.*?)\](.*)$", read_page("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == version
    assert re.fullmatch(r" - \d{4}-\d\d-\d\d", headings[1][1])


def test_the_workflow_runs_what_people_run_on_the_oldest_python() -> None:
    workflow = yaml.safe_load(read_page(".github/workflows/ci.yml"))
    steps = workflow["jobs"]["run"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    (python,) = (step["with"]["python-version"] for step in steps if "setup-python" in str(step))
    project = tomllib.loads(read_page("pyproject.toml"))["project"]
    assert project["requires-python"] == f">={python}"
