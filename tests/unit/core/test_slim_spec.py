"""What a session's FF blocks run on: experts of every layer, in like or different numbers."""

from __future__ import annotations

import pytest
import torch

from griffin_core.experts.slim_spec import SlimSpec


def set_of(*layers: tuple[int, ...], intermediate_size: int = 10) -> SlimSpec:
    each = (torch.tensor(layer, dtype=torch.int32) for layer in layers)
    return SlimSpec.of_layers(intermediate_size, each)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        (((0, 1), (3, 3)), "ascending"),
        (((0, 1), (5, 2)), "ascending"),
        (((-1, 1), (0, 1)), r"in \[0, 10\)"),
        (((0, 1), (2, 10)), r"in \[0, 10\)"),
    ],
)
def test_a_set_of_which_one_layer_is_none_is_refused(
    layers: tuple[tuple[int, ...], ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        set_of(*layers)


@pytest.mark.parametrize("counts", [(), (2,), (2, 2)])
def test_experts_that_are_not_as_many_as_the_counts_are_refused(counts: tuple[int, ...]) -> None:
    experts = torch.tensor([1, 2, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"experts: got \(3,\)"):
        SlimSpec(intermediate_size=10, counts=counts, experts=experts)


def test_layers_of_different_numbers_are_found_by_their_offsets() -> None:
    slim = set_of((7,), (0, 5, 9), (2, 3))
    assert slim.counts == (1, 3, 2)
    assert slim.offsets == (0, 1, 4, 6)
    assert [layer.tolist() for layer in slim.layers] == [[7], [0, 5, 9], [2, 3]]
    assert slim.density == 0.2
    assert slim.prunes and not set_of(tuple(range(10)), tuple(range(10))).prunes


def test_the_table_repeats_the_last_expert_of_a_layer_that_has_fewer() -> None:
    assert set_of((7,), (0, 5, 9), (2, 3)).table.tolist() == [[7, 7, 7], [0, 5, 9], [2, 3, 3]]


def test_the_mask_has_a_layers_experts_and_no_other() -> None:
    mask = set_of((7,), (0, 5, 9), (2, 3)).mask()
    assert [row.nonzero().flatten().tolist() for row in mask] == [[7], [0, 5, 9], [2, 3]]


@pytest.mark.parametrize("first", [(3, 3), (5, 2), (-1, 2), (2, 10)])
def test_a_bad_layer_among_layers_of_other_numbers_is_refused(first: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        set_of(first, (0, 1, 2))


def test_jaccard_is_intersection_over_union_of_each_layer() -> None:
    one = set_of((1, 2, 3), (0, 5, 9))
    two = set_of((2, 3, 4), (0, 5, 9))
    assert one.jaccard(two) == [pytest.approx(2 / 4), 1.0]
    assert one.jaccard(two) == two.jaccard(one)


def test_jaccard_of_different_models_is_an_error() -> None:
    with pytest.raises(ValueError, match="different shape"):
        set_of((1,)).jaccard(set_of((1,), intermediate_size=11))


def test_density_is_the_kept_fraction() -> None:
    assert set_of((1, 2), (0, 9)).density == 0.2


def test_norm_mass_is_the_experts_share_of_s2() -> None:
    s2 = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    kept = set_of((1, 3), (0, 2), (0, 1), intermediate_size=4)
    assert kept.norm_mass(s2) == pytest.approx((0.6, 0.5, 1.0))
    kept = set_of((3,), (0, 1, 2), (0, 1), intermediate_size=4)
    assert kept.norm_mass(s2) == pytest.approx((0.4, 0.75, 1.0))


def test_the_digest_tells_sets_apart() -> None:
    assert set_of((1, 2), (3, 4)).digest == set_of((1, 2), (3, 4)).digest
    assert set_of((1, 2), (3, 4)).digest != set_of((1, 2), (3, 5)).digest
    assert set_of((1, 2), (3, 4)).digest != set_of((1, 2, 3, 4)).digest
    assert set_of((1, 2, 3), (4,)).digest != set_of((1, 2), (3, 4)).digest
    assert set_of((1, 2), (3, 4)).digest != set_of((1, 2), (3, 4), intermediate_size=11).digest
