"""Expert sets: their figures, and their form on the wire."""

from __future__ import annotations

import pytest
import torch

from griffin_core.experts.expert_set import pack_indices, unpack_indices


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
