"""What steps are taken to cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from griffin_core.model.load import Model
from griffin_core.slim.costs import (
    ASSUMED_COSTS,
    MOST_COPIES,
    BlockCosts,
    GraphCosts,
    measure_costs,
)
from griffin_core.slim.packed import Packed

BLOCKS = BlockCosts(
    rest={1: 1.0, 2: 2.0, 4: 4.0},
    dense={1: 10.0, 2: 12.0, 4: 14.0},
    half={1: 6.0, 2: 7.0, 4: 8.0},
)
GRAPHS = GraphCosts(
    dense={1: 6.0, 2: 6.5, 4: 7.0, 16: 8.0},
    zeroed={2: 6.6, 4: 7.1, 16: 8.1},
    shared={2: (4.0, 6.5), 4: (5.0, 7.2), 16: (6.0, 9.0)},
    private={1: (4.0, 6.0), 2: (6.0, 10.0), 4: (10.0, 18.0)},
)


def test_copies_pay_as_long_as_they_take_no_longer_than_the_dense_ff() -> None:
    assert [BLOCKS.max_copies(density) for density in (0.25, 0.5, 0.75, 1.0)] == [3, 2, 1, 1]
    assert BLOCKS.copies_pay(whole=0, own=[0.5, 0.5])
    assert not BLOCKS.copies_pay(whole=0, own=[0.5] * 3)
    assert not BLOCKS.copies_pay(whole=1, own=[0.5])  # the weights are read for the other anyway
    assert not BLOCKS.copies_pay(whole=0, own=[])


def test_a_step_of_blocks_is_the_sum_of_its_groups() -> None:
    assert BLOCKS.step_s(dense=4, own=[], shared=[]) == 18.0
    assert BLOCKS.step_s(dense=0, own=[0.5], shared=[]) == 7.0
    assert BLOCKS.step_s(dense=0, own=[0.5] * 4, shared=[]) == 18.0  # zeroed
    assert BLOCKS.step_s(dense=2, own=[], shared=[(0.5, 2)]) == 4.0 + 12.0 + 7.0
    assert BLOCKS.step_s(dense=0, own=[], shared=[(0.75, 4)]) == 4.0 + 11.0
    assert BLOCKS.step_s(dense=8, own=[], shared=[]) == 8.0 + 18.0  # on the last line


def test_a_step_of_a_graph_is_that_of_the_next_captured_size() -> None:
    assert GRAPHS.step_s(dense=3, own=[], shared=[]) == 7.0
    assert GRAPHS.step_s(dense=0, own=[0.5], shared=[]) == 4.0
    assert GRAPHS.step_s(dense=0, own=[0.5] * 2, shared=[]) == 6.0
    assert GRAPHS.step_s(dense=0, own=[0.5] * 3, shared=[]) == 7.1  # zeroed
    assert GRAPHS.step_s(dense=0, own=[], shared=[(0.5, 16)]) == 6.0
    assert GRAPHS.step_s(dense=1, own=[], shared=[(0.5, 15)]) == 8.1  # not all on one set
    assert GRAPHS.step_s(dense=0, own=[], shared=[(0.5, 64)]) == 6.0


def test_private_graphs_run_up_to_the_density_at_which_they_cost_what_zeroing_costs() -> None:
    assert GRAPHS.private_up_to(1) == 1.0
    assert GRAPHS.private_up_to(2) == pytest.approx(0.575)
    assert GRAPHS.private_up_to(4) == pytest.approx(0.31875)
    assert GRAPHS.private_up_to(16) == 0.0


def test_by_bytes_alone_two_halves_are_a_whole() -> None:
    assert [ASSUMED_COSTS.max_copies(d) for d in (1.0, 0.75, 0.5, 0.25)] == [1, 1, 2, 4]
    assert ASSUMED_COSTS.max_copies(0.01) == MOST_COPIES


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_costs_are_measured(name: str, tiny: Callable[[str], Model]) -> None:
    costs = measure_costs(tiny(name).decoder, Packed())
    assert all(1 <= costs.max_copies(density) <= MOST_COPIES for density in (0.01, 0.5, 1.0))
    for sessions in (1, 3, 16, 40):
        assert costs.step_s(dense=sessions, own=[], shared=[]) > 0
        private = costs.step_s(dense=0, own=[0.5] * sessions, shared=[])
        assert 0 < private <= costs.step_s(dense=sessions, own=[], shared=[])
