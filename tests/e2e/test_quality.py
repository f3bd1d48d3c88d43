"""The right neurons are kept: on real text, divergence from the dense model by policy."""

from __future__ import annotations

import pytest

from griffin_core.experts.selection import Selection
from griffin_core.model.load import Model
from griffin_evals.divergence import CONTINUATION_TOKENS, PROMPT_TOKENS, divergence
from tests.e2e.texts import ARTICLE, LICENCE, cut


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(ARTICLE, id="article"),
        pytest.param(LICENCE, id="licence", marks=pytest.mark.e2e),
    ],
)
def test_topk_diverges_less_than_a_third_of_what_magnitude_and_random_do(
    text: str, smollm2: Model
) -> None:
    ids = cut(text, PROMPT_TOKENS + CONTINUATION_TOKENS, smollm2.tokenizer)
    topk, magnitude, random = (
        divergence(smollm2, ids, PROMPT_TOKENS, Selection(density=0.5, policy=policy, seed=1))
        for policy in ("topk", "magnitude", "random")
    )
    assert 0 < topk < magnitude / 3
    assert topk < random / 3
