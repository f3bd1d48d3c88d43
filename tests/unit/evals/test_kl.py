"""KL from the dense model and agreement with it, measured for many selections at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from griffin_core.experts.policies import POLICIES
from griffin_core.experts.selection import Selection
from griffin_core.model.load import Model
from griffin_evals.divergence import divergence
from griffin_evals.kl import PROMPT_TOKENS, SCORED_TOKENS, divergences, token_windows

WINDOW = [(7 * n + n * n) % 250 for n in range(60)]
PROMPT = 40


def test_each_selection_has_what_it_has_alone(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    selections = [Selection(density=d, policy=p, seed=3) for d in (0.75, 0.5) for p in POLICIES]
    together = list(divergences(model, WINDOW, PROMPT, selections))
    for selection, found in zip(selections, together, strict=True):
        alone = divergence(model, WINDOW, PROMPT, selection)
        assert found.kl == pytest.approx(alone, rel=1e-4, abs=1e-6)
        assert 0 <= found.agreement <= 1
        assert found.agreement * (len(WINDOW) - PROMPT) == pytest.approx(
            round(found.agreement * (len(WINDOW) - PROMPT))
        )
    assert len({each.kl for each in together}) == len(together)


def test_all_neurons_are_the_dense_model(tiny: Callable[[str], Model]) -> None:
    (found,) = divergences(tiny("opt"), WINDOW, PROMPT, [Selection(density=1.0)])
    assert (found.kl, found.agreement) == (0.0, 1.0)


def test_windows_do_not_overlap_and_leave_the_rest_out() -> None:
    step = PROMPT_TOKENS + SCORED_TOKENS
    ids = list(range(2 * step + 5))
    assert token_windows(ids) == [ids[:step], ids[step : 2 * step]]
    assert token_windows(ids[: step - 1]) == []
