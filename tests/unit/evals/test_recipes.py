"""Recipes by name."""

from __future__ import annotations

import pytest

from griffin_evals.recipes import NamedRecipe, parse_recipe


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("topk", NamedRecipe("topk", "none", 0)),
        ("topk+warmup48", NamedRecipe("topk", "none", 0, 48)),
        ("sensitive+bias", NamedRecipe("sensitive", "bias", 0)),
        ("sensitive+residual", NamedRecipe("sensitive", "residual", 64)),
        ("sensitive+residual16+warmup5", NamedRecipe("sensitive", "residual", 16, 5)),
    ],
)
def test_a_name_says_policy_correction_and_warm_up(name: str, recipe: NamedRecipe) -> None:
    assert parse_recipe(name) == recipe


@pytest.mark.parametrize(
    "name",
    ["best", "topk+", "topk+bias3", "topk+residual0", "topk+residual999", "topk+warmup", "topk+48",
     "topk+warmup0", "topk+warmup-1", "topk+warmup48+bias", "+warmup3"],
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="allowed"):
        parse_recipe(name)
