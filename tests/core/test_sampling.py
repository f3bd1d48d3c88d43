"""Sampling, against transformers' own processors where it has them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from griffin_core.decode.sampling import Sampler, SamplingParams, logprobs_at, truncate
from griffin_core.errors import InvalidRequest

V = 500
CPU = torch.device("cpu")


def draws(logits: torch.Tensor, count: int, **params: object) -> list[int]:
    sampler = Sampler(SamplingParams(**params), len(logits), CPU)
    return [sampler.sample(logits) for _ in range(count)]


@pytest.mark.parametrize(
    ("kept", "warper"),
    [
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.6}, TopPLogitsWarper(0.6)),
        ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_truncation_is_transformers(kept: dict[str, float], warper: object) -> None:
    logits = torch.randn(V) * 3
    params = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **kept}
    ours = truncate(logits.softmax(0), **params)
    theirs = warper(None, logits[None].clone())[0].softmax(0)
    torch.testing.assert_close(ours, theirs)


def test_truncations_in_a_row_are_transformers() -> None:
    logits = torch.randn(V) * 3
    theirs = logits[None].clone()
    for warper in (TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        theirs = warper(None, theirs)
    ours = truncate(logits.softmax(0), top_k=50, top_p=0.9, min_p=0.05)
    torch.testing.assert_close(ours, theirs[0].softmax(0))


def test_a_tiny_top_p_leaves_the_likeliest() -> None:
    logits = torch.randn(V)
    assert set(draws(logits, 20, temperature=1.0, top_p=1e-9)) == {int(logits.argmax())}


def test_repetition_penalty_is_transformers() -> None:
    logits = torch.randn(V)
    seen = [3, 8, int(logits.argmax())]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits[None].clone())[0]
    sampler = Sampler(SamplingParams(repetition_penalty=1.7), V, CPU)
    sampler.see_prompt(seen)
    assert sampler.sample(logits) == int(theirs.argmax())


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.zeros(4)
    logits[0] = 1.0
    sampler = Sampler(SamplingParams(frequency_penalty=0.4), 4, CPU)
    sampler.see_prompt([0, 0, 0, 0])
    # 1, 0.6, 0.2, then -0.2 is behind token 1's 0
    assert [sampler.sample(logits) for _ in range(4)] == [0, 0, 0, 1]
    sampler = Sampler(SamplingParams(presence_penalty=2.0), 4, CPU)
    assert [sampler.sample(logits) for _ in range(2)] == [0, 1]


def test_logit_bias_is_added() -> None:
    logits = torch.randn(V)
    assert draws(logits, 1, logit_bias={42: 100.0}) == [42]
    assert draws(logits, 1, logit_bias={int(logits.argmax()): -100.0}) != [int(logits.argmax())]


def test_a_seed_repeats_and_another_differs() -> None:
    logits = torch.randn(V)
    assert draws(logits, 30, temperature=1.0, seed=5) == draws(logits, 30, temperature=1.0, seed=5)
    assert draws(logits, 30, temperature=1.0, seed=5) != draws(logits, 30, temperature=1.0, seed=6)


def test_draws_follow_the_distribution_at_temperature() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    made = torch.tensor(draws(logits, 4000, temperature=2.0, seed=1)).bincount(minlength=3) / 4000
    expected = (logits / 2).softmax(0)
    torch.testing.assert_close(made, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [1e-40, 1e-5, 1e5])
def test_extreme_temperatures_still_draw(temperature: float) -> None:
    assert 0 <= draws(torch.randn(V) * 50, 1, temperature=temperature)[0] < V


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = torch.randn(V)
    before = logits.clone()
    draws(
        logits,
        3,
        temperature=0.7,
        top_k=3,
        logit_bias={1: 5.0},
        repetition_penalty=2.0,
        presence_penalty=1.0,
        frequency_penalty=1.0,
    )
    assert torch.equal(logits, before)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.randn(V)
    expected = logits.log_softmax(0)
    got = logprobs_at(logits, 17, 3)
    assert got.chosen == pytest.approx(expected[17].item())
    assert [token for token, _ in got.top] == expected.topk(3).indices.tolist()
    assert logprobs_at(logits, 17, 0).top == ()


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -1.0, ">= 0"),
        ("temperature", math.nan, ">= 0"),
        ("temperature", math.inf, ">= 0"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 2.0, "(0, 1]"),
        ("min_p", -0.1, "[0, 1]"),
        ("repetition_penalty", 0.0, "[0.01, 100]"),
        ("presence_penalty", 2.5, "[-2, 2]"),
        ("frequency_penalty", math.nan, "[-2, 2]"),
    ],
)
def test_values_out_of_range_name_field_value_and_range(
    field: str, value: float, allowed: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == f"sampling.{field}"
    assert str(caught.value) == f"sampling.{field}: got {value!r}; allowed: {allowed}"


def test_logit_biases_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"logit_bias\[3\]"):
        SamplingParams(logit_bias={3: math.nan})
    with pytest.raises(InvalidRequest, match="at most 1024"):
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-50},
        {"temperature": 1e-320},
        {"temperature": 1e30},
        {"temperature": 1.0, "top_p": 1e-50},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1e-300, "top_p": 1e-300, "repetition_penalty": 0.01},
        {"temperature": 1.0, "repetition_penalty": 100.0},
    ],
    ids=str,
)
def test_every_allowed_value_draws_a_token(params: dict[str, float]) -> None:
    logits = torch.tensor([1.0, 3.0, -2.0, 2.9])
    sampler = Sampler(SamplingParams(**params), 4, CPU)
    sampler.see_prompt([0, 1])
    drawn = sampler.sample(logits)
    assert 0 <= drawn < 4
    if params["temperature"] < 1 and len(params) == 1:
        assert drawn == 1  # as cold as that is greedy
