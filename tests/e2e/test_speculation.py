"""Lossless on real text: SmolLM2 in float32 makes the same tokens with drafts as without."""

from __future__ import annotations

from typing import Any

import pytest

from griffin_core import LLM, SamplingParams, SpeculationParams, StoppingParams
from griffin_core.model.load import Model
from tests.e2e.texts import ARTICLE, LICENCE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

PROMPTS = [2, pytest.param(50, marks=pytest.mark.slow)]
TOKENS = 30
LOOKUP = SpeculationParams(mode="lookup", verify="dense")
AUTO, SLIM = SpeculationParams(mode="auto"), SpeculationParams(mode="slim")


@pytest.mark.parametrize("count", PROMPTS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_seed_gives_the_same_tokens(temperature: float, count: int, smollm2: Model) -> None:
    """In a changing batch of 16, in which each request ends at another place, and alone."""
    text = ARTICLE + LICENCE
    prompts = [text[150 * n : 150 * n + 300 + 40 * (n % 9)] for n in range(count)]
    stopping = [StoppingParams(max_tokens=TOKENS + n % 7, ignore_eos=True) for n in range(count)]

    def made(llm: LLM, way: SpeculationParams, count: int = count) -> tuple[list[Any], int]:
        completions = llm.generate(
            prompts[:count],
            sampling=SamplingParams(temperature=temperature, top_p=0.95),
            stopping=stopping[:count],
            seed=11,
            density=0.5 if way is SLIM else 1.0,
            speculation=way,
        )
        figures = [each.speculation for each in completions]
        accepted = sum(one.lookup_accepted + one.slim_accepted for one in figures)
        return [each.token_ids for each in completions], accepted

    with LLM(smollm2, max_sessions=16, sharing="private") as llm:
        plain, _ = made(llm, SpeculationParams())
        assert made(llm, LOOKUP)[0] == plain
        assert made(llm, AUTO)[0] == plain
        assert made(llm, SLIM)[0] == plain
    with LLM(smollm2, max_sessions=1, sharing="private") as llm:
        some = count // 2
        assert made(llm, LOOKUP, some)[0] == plain[:some]
        drafted, accepted = made(llm, SLIM, some)
        assert drafted == plain[:some] and accepted > 0
