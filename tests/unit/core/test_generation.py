"""What a stream shows, and when."""

from __future__ import annotations

import pytest

from griffin_core.engine.generation import FlushPolicy


@pytest.mark.parametrize(
    ("streams", "tokens"), [(0, 1), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (16, 4), (64, 4)]
)
def test_the_more_streams_the_more_tokens_a_message(streams: int, tokens: int) -> None:
    pace = FlushPolicy(None)
    pace.set(streams=streams, prompts=False)
    assert pace.tokens == tokens
    pace.set(streams=streams, prompts=True)  # they wait for chunks of a prompt already
    assert pace.tokens == 1


def test_a_fixed_number_stays() -> None:
    pace = FlushPolicy(7)
    for streams in (1, 64):
        pace.set(streams=streams, prompts=False)
        assert pace.tokens == 7
