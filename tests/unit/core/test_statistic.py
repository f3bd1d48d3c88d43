"""The statistic is the paper's formula, and additive."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from griffin_core.experts.selection import Selection
from griffin_core.experts.statistic import group_score, relative, sums_of
from griffin_core.forward.events import (
    LayerExperts,
)
from griffin_core.forward.prefill import prefill
from griffin_core.model.load import Model
from tests.tiny import FAMILIES, VOCABULARY


def s2_of(z: torch.Tensor) -> torch.Tensor:
    return sums_of(z)[0]


def paper_s(z: torch.Tensor) -> torch.Tensor:
    """s of arXiv 2404.01365, section 4.2, written out in float64, token by token."""
    columns = [0.0] * z.shape[1]
    for row in z.double().tolist():
        norm = math.sqrt(sum(value * value for value in row))
        if norm > 0:
            for neuron, value in enumerate(row):
                columns[neuron] += (value / norm) ** 2
    return torch.tensor([math.sqrt(value) for value in columns], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_s_is_the_papers_formula(dtype: torch.dtype) -> None:
    z = (torch.randn(37, 53) * 10).to(dtype)
    torch.testing.assert_close(s2_of(z).sqrt().double(), paper_s(z), rtol=1e-5, atol=1e-6)


def test_a_single_token_is_its_own_normalized_activations() -> None:
    z = torch.tensor([[3.0, -4.0, 0.0]])
    torch.testing.assert_close(s2_of(z).sqrt(), torch.tensor([0.6, 0.8, 0.0]))


def test_zero_rows_add_nothing_and_no_nan() -> None:
    z = torch.zeros(4, 5)
    assert torch.equal(s2_of(z), torch.zeros(5))
    z[2] = torch.arange(5.0)
    torch.testing.assert_close(s2_of(z), s2_of(z[2:3]))


def test_float16_rows_whose_norm_overflows_float16_are_finite() -> None:
    z = torch.full((2, 64), 60000.0, dtype=torch.float16)
    torch.testing.assert_close(s2_of(z), torch.full((64,), 2 / 64))


def test_s2_adds_over_any_split_of_the_tokens() -> None:
    z = torch.randn(50, 31)
    parts = torch.split(z, [1, 7, 20, 2, 20])
    torch.testing.assert_close(sum(s2_of(part) for part in parts), s2_of(z))


def test_s2_sums_to_the_number_of_nonzero_tokens() -> None:
    z = torch.randn(12, 31).relu()
    z[3] = 0
    assert s2_of(z).sum().item() == pytest.approx(11)


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_takes_it_of_transformers_activations_left_padding_left_out(
    name: str, tiny: Callable[[str], Model], tiny_directory: Callable[[str], Path]
) -> None:
    """Two prompts in one padded batch of transformers give the s that each has in ours."""
    torch.manual_seed(3)
    prompts = [torch.randint(0, VOCABULARY - 4, (n,)) for n in (6, 17)]
    padded = torch.full((2, 17), 258)
    padded[0, 11:], padded[1] = prompts[0], prompts[1]
    mask = (torch.arange(17)[None] >= torch.tensor([[11], [0]])).long()
    reference = AutoModelForCausalLM.from_pretrained(
        tiny_directory(name), dtype=torch.float32, attn_implementation="eager"
    )
    seen: list[torch.Tensor] = []
    for path, module in reference.named_modules():
        if path.endswith(("mlp.down_proj", ".fc2")):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        reference(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for row, prompt in enumerate(prompts):
        events = prefill(tiny(name).decoder, prompt.tolist(), Selection(density=0.5))
        layers = [event for event in events if isinstance(event, LayerExperts)]
        for layer, padded_z in zip(layers, seen, strict=True):
            z = padded_z.view(2, 17, -1)[row][mask[row].bool()]
            torch.testing.assert_close(layer.s2.double().sqrt(), paper_s(z), rtol=1e-4, atol=1e-5)


def test_group_score_is_sum_of_s_over_root_of_length() -> None:
    lengths = [3, 40]
    zs = [torch.randn(n, 29) for n in lengths]
    expected = sum(paper_s(z) / math.sqrt(n) for z, n in zip(zs, lengths, strict=True))
    torch.testing.assert_close(
        group_score([s2_of(z) for z in zs]).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_group_score_of_one_orders_as_its_s() -> None:
    s2 = s2_of(torch.randn(9, 29))
    assert torch.equal(group_score([s2]).argsort(), s2.argsort())


def test_group_score_of_silent_prompts_is_zero_and_of_none_an_error() -> None:
    assert torch.equal(group_score([torch.zeros(4)]), torch.zeros(4))
    with pytest.raises(ValueError, match="at least one"):
        group_score([])


def test_a_row_whose_squares_are_subnormal_adds_nothing() -> None:
    z = torch.tensor([[1e-20, 0.0, 0.0], [1.0, 1.0, 0.0]])
    torch.testing.assert_close(s2_of(z), torch.tensor([0.5, 0.5, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_squares_of_relative_activations_add_up_to_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = (torch.randn(9, 40) * 100).to(dtype)
    z[3] = 0
    values = relative(z)
    assert values[3].count_nonzero() == 0 and values.dtype == torch.float32
    torch.testing.assert_close(values.square().sum(dim=0), s2_of(z), rtol=1e-4, atol=1e-6)
