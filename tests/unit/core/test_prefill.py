"""The prompt phase: chunks change nothing, and what is yielded is whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from griffin_core.backends.base import Backend
from griffin_core.experts.selection import Selection
from griffin_core.experts.statistic import Statistics
from griffin_core.forward.events import (
    LayerExperts,
    LayerKv,
    PrefillFinished,
)
from griffin_core.forward.prefill import prefill
from griffin_core.model.load import Model
from tests.tiny import FAMILIES, VOCABULARY

HALF = Selection(density=0.5)


def run(model: Model, ids: list[int], **options: object) -> list[object]:
    return list(prefill(model.decoder, ids, HALF, **options))


def of(kind: type, events: list[object]) -> list:
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture
def ids() -> list[int]:
    torch.manual_seed(4)
    return torch.randint(0, VOCABULARY, (41,)).tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk_tokens", [1, 2, 13, 40, 41])
def test_any_chunk_size_gives_the_same_statistic_experts_and_hidden_state(
    name: str, chunk_tokens: int, tiny: Callable[[str], Model], ids: list[int]
) -> None:
    whole = run(tiny(name), ids)
    chunked = run(tiny(name), ids, chunk_tokens=chunk_tokens)
    for one, other in zip(of(LayerExperts, whole), of(LayerExperts, chunked), strict=True):
        torch.testing.assert_close(one.s2.sqrt(), other.s2.sqrt(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.sums, other.sums, rtol=1e-4, atol=1e-4)
        assert torch.equal(one.experts, other.experts)
    torch.testing.assert_close(
        of(PrefillFinished, whole)[0].last_hidden,
        of(PrefillFinished, chunked)[0].last_hidden,
        rtol=1e-4,
        atol=1e-4,
    )


def test_events_cover_every_token_of_every_layer_in_order(
    tiny: Callable[[str], Model], ids: list[int]
) -> None:
    events = run(tiny("llama"), ids, chunk_tokens=16)
    for layer in range(3):
        runs = [event for event in of(LayerKv, events) if event.layer == layer]
        assert [event.first_token for event in runs] == [0, 16, 32]
        assert [event.kv.shape for event in runs] == [(2, 2, n, 16) for n in (16, 16, 9)]
    assert [event.layer for event in of(LayerExperts, events)] == [0, 1, 2]
    assert events.count(None) == 2  # a pause after each chunk but the last
    assert isinstance(events[-1], PrefillFinished)


@pytest.mark.parametrize("watch", [(), (1,)])
def test_a_reader_that_pauses_it_is_not_computing(
    watch: tuple[int, ...],
    tiny: Callable[[str], Model],
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(Backend, "timestamp", lambda backend: now)
    for event in prefill(tiny("llama").decoder, ids, HALF, chunk_tokens=16, watch=watch):
        if isinstance(event, PrefillFinished):
            assert event.compute_s == 0
        now += 5


def test_a_later_turn_adds_to_the_statistic_of_the_earlier(
    tiny: Callable[[str], Model], ids: list[int]
) -> None:
    model = tiny("qwen3")
    whole = of(LayerExperts, run(model, ids))
    cache = model.decoder.new_cache(len(ids))
    first = of(LayerExperts, run(model, ids[:30], cache=cache))
    sums = torch.stack([event.sums for event in first], dim=1)
    before = Statistics(sums=sums, tokens=30)
    second = of(LayerExperts, run(model, ids[30:], cache=cache, statistics=before))
    for one, other in zip(whole, second, strict=True):
        torch.testing.assert_close(one.s2.sqrt(), other.s2.sqrt(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.sums, other.sums, rtol=1e-4, atol=1e-4)
        assert torch.equal(one.experts, other.experts)


def test_a_prompt_of_one_token_has_its_own_experts(tiny: Callable[[str], Model]) -> None:
    one, other = (of(LayerExperts, run(tiny("llama"), [token])) for token in (5, 77))
    assert all(len(event.experts) == 44 for event in one)
    assert any(not torch.equal(a.experts, b.experts) for a, b in zip(one, other, strict=True))
    assert one[0].s2.sum().item() == pytest.approx(1)


def test_relu_prompts_with_silent_tokens_give_no_nan(tiny: Callable[[str], Model]) -> None:
    events = of(LayerExperts, run(tiny("llama-relu"), [9, 9, 9]))
    assert all(event.s2.isfinite().all() for event in events)


def test_an_empty_prompt_is_an_error(tiny: Callable[[str], Model]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        run(tiny("llama"), [])
