"""Expert sets: their figures, and their form on the wire."""

from __future__ import annotations

import pytest
import torch

from griffin_core.experts.expert_set import ExpertSet, pack_indices, unpack_indices


def experts(*indices: int) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int32)


def test_packed_indices_come_back_and_are_little_endian() -> None:
    kept = experts(0, 7, 258)
    data = pack_indices(kept)
    assert data == b"\x00\0\0\0\x07\0\0\0\x02\x01\0\0"
    assert torch.equal(unpack_indices(data, 300, "experts"), kept)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\0\0\0", "got 3 bytes; allowed: int32 values"),
        (b"", "allowed: int32"),
        (pack_indices(experts(3, 3)), "ascending"),
        (pack_indices(experts(5, 2)), "ascending"),
        (pack_indices(experts(-1, 2)), r"in \[0, 10\)"),
        (pack_indices(experts(2, 10)), r"in \[0, 10\)"),
    ],
)
def test_bytes_that_are_no_expert_set_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        unpack_indices(data, 10, "experts of layer 4")


def set_of(*layers: tuple[int, ...], ff_width: int = 10) -> ExpertSet:
    return ExpertSet(ff_width=ff_width, indices=torch.tensor(layers, dtype=torch.int32))


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        (((0, 1), (3, 3)), "ascending"),
        (((0, 1), (5, 2)), "ascending"),
        (((-1, 1), (0, 1)), r"in \[0, 10\)"),
        (((0, 1), (2, 10)), r"in \[0, 10\)"),
        ((), r"allowed: \[L, K\]"),
    ],
)
def test_a_set_of_which_one_layer_is_none_is_refused(
    layers: tuple[tuple[int, ...], ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        set_of(*layers)


def test_jaccard_is_intersection_over_union_of_each_layer() -> None:
    one = set_of((1, 2, 3), (0, 5, 9))
    two = set_of((2, 3, 4), (0, 5, 9))
    assert one.jaccard(two) == [pytest.approx(2 / 4), 1.0]
    assert one.jaccard(two) == two.jaccard(one)


def test_jaccard_of_different_models_is_an_error() -> None:
    with pytest.raises(ValueError, match="different shape"):
        set_of((1,)).jaccard(set_of((1,), ff_width=11))


def test_density_is_the_kept_fraction() -> None:
    assert set_of((1, 2), (0, 9)).density == 0.2


def test_norm_mass_is_the_experts_share_of_s2() -> None:
    s2 = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    kept = set_of((1, 3), (0, 2), (0, 1), ff_width=4)
    assert kept.norm_mass(s2) == pytest.approx((0.6, 0.5, 1.0))


def test_the_digest_tells_sets_apart() -> None:
    assert set_of((1, 2), (3, 4)).digest == set_of((1, 2), (3, 4)).digest
    assert set_of((1, 2), (3, 4)).digest != set_of((1, 2), (3, 5)).digest
    assert set_of((1, 2), (3, 4)).digest != set_of((1, 2, 3, 4)).digest
