"""Slim views: built a layer at a time, shared, kept while there is room; and the byte budget."""

from __future__ import annotations

import pytest
import torch

from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.kv.budget import Budget
from griffin_core.model.load import Model
from griffin_core.slim.blocks import BlockTable
from griffin_core.slim.packed import Packed
from griffin_core.slim.views import MOST_UNUSED, SlimView, SlimViews


def experts(first: int, k: int = 44) -> SlimSpec:
    layer = torch.arange(first, first + k, dtype=torch.int32)
    return SlimSpec.of_layers(88, layer.expand(3, -1))


def views_of(model: Model, room: float) -> tuple[SlimViews, Budget]:
    """Room for so many views of 44 experts."""
    views = SlimViews(model.decoder, BlockTable(model.decoder), Packed(), Budget(1))
    size = views.planned_bytes((44, 44, 44))
    budget = Budget(int(room * size))
    return SlimViews(model.decoder, BlockTable(model.decoder), Packed(), budget), budget


def built(views: SlimViews, of: SlimSpec) -> SlimView:
    view = views.acquire(of, "gemv")
    while not view.ready:
        views.build(0.0)
    return view


def test_a_view_is_built_layer_by_layer(model: Model) -> None:
    views, _ = views_of(model, 1)
    view = views.acquire(experts(0), "gemv")
    for layers in range(3):
        assert len(view.layers) == layers and not view.ready
        views.build(0.0)
    assert view.ready and not views.building


def test_equal_sets_share_a_view(model: Model) -> None:
    views, budget = views_of(model, 3)
    one, same, other = built(views, experts(0)), built(views, experts(0)), built(views, experts(1))
    assert one is same and one is not other
    assert budget.held == one.nbytes + other.nbytes


def test_a_view_for_one_row_is_another_than_one_for_many(model: Model) -> None:
    views, _ = views_of(model, 2)
    assert views.acquire(experts(0), "gemv") is not views.acquire(experts(0), "gemm")


def test_all_neurons_hold_nothing(model: Model) -> None:
    views, budget = views_of(model, 1)
    assert built(views, experts(0, 88)).nbytes == 0
    assert budget.held == 0


def test_unused_views_stay_until_their_bytes_are_needed_the_longest_unused_first(
    model: Model,
) -> None:
    views, budget = views_of(model, 2.5)
    first, second = built(views, experts(0)), built(views, experts(1))
    views.release(first)
    views.release(second)
    assert views.acquire(experts(0), "gemv") is first  # still there, and in use again
    views.release(first)
    built(views, experts(2))  # one must go, and first was used last
    assert len(views) == 2
    assert views.acquire(experts(0), "gemv") is first
    assert budget.peak <= budget.limit


def test_no_more_than_a_few_unused_views_are_kept(model: Model) -> None:
    views, budget = views_of(model, 100)
    held = [built(views, experts(first)) for first in range(MOST_UNUSED + 3)]
    for view in held:
        views.release(view)
    assert len(views) == MOST_UNUSED
    assert budget.held == sum(view.nbytes for view in held[3:])


def test_a_view_in_use_never_gives_way(model: Model) -> None:
    views, _ = views_of(model, 1.5)
    built(views, experts(0))
    with pytest.raises(MemoryError, match="session memory"):
        views.acquire(experts(1), "gemv")


def test_a_view_that_is_dropped_half_built_is_forgotten(model: Model) -> None:
    views, budget = views_of(model, 1)
    view = views.acquire(experts(0), "gemv")
    views.build(0.0)
    views.release(view)
    assert not views.building and len(views) == 0 and budget.held == 0
    assert built(views, experts(0)) is not view
