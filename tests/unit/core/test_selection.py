"""Selection policies."""

from __future__ import annotations

import pytest
import torch

from griffin_core.errors import InvalidRequest
from griffin_core.experts.parameters import SelectionParameters
from griffin_core.experts.policies import POLICIES, PolicyName
from griffin_core.experts.selection import Selection, default_selection, select_experts
from griffin_core.experts.statistic import Statistics
from griffin_core.spec.calibration import Recipe
from griffin_core.spec.choices import CALIBRATED_POLICIES
from tests.calibrations import made_up

F = 200


def select(s2: torch.Tensor, policy: PolicyName, density: float, seed: int = 0) -> torch.Tensor:
    """Of one layer, the second of three."""
    return select_experts(
        torch.stack([s2.flip(0), s2, torch.zeros_like(s2)]),
        Selection(density=density, policy=policy, seed=seed),
        magnitude=lambda: torch.arange(len(s2), 0, -1).float().expand(3, -1),
        calibration=made_up(3, len(s2)),
    ).layers[1]


@pytest.mark.parametrize(
    ("density", "k"),
    [(1.0, F), (0.5, 100), (0.499, 99), (0.29, 58), (0.001, 1), (1e-9, 1), (0.9999, 199)],
)
def test_k_is_floor_of_f_times_density_and_at_least_one(density: float, k: int) -> None:
    assert Selection(density=density).count(F) == k


def test_k_is_not_a_victim_of_binary_fractions() -> None:
    # 100 * 0.29 == 28.999999999999996
    assert Selection(density=0.29).count(100) == 29


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        Selection(density=density)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("density", [0.004, 0.5, 0.505, 1.0])
def test_every_policy_gives_k_distinct_ascending_indices(
    policy: PolicyName, density: float
) -> None:
    experts = select(torch.rand(F), policy, density)
    assert experts.dtype == torch.int32
    if policy not in CALIBRATED_POLICIES:
        assert len(experts) == Selection(density=density).count(F)
    assert (experts[1:] > experts[:-1]).all()
    assert experts[0] >= 0 and experts[-1] < F


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_copes_with_a_prompt_that_fired_nothing(policy: PolicyName) -> None:
    assert 30 <= len(select(torch.zeros(F), policy, 0.3)) <= 120


def test_topk_takes_the_largest_and_breaks_ties_by_index() -> None:
    s2 = torch.tensor([1.0, 5.0, 2.0, 2.0, 2.0, 0.0])
    assert select(s2, "topk", 0.5).tolist() == [1, 2, 3]


def test_magnitude_does_not_look_at_the_prompt() -> None:
    assert select(torch.rand(F), "magnitude", 0.05).tolist() == list(range(10))


@pytest.mark.parametrize("policy", ["sampled", "topk_sampled", "random"])
def test_draws_repeat_with_their_seed_and_differ_with_another(policy: PolicyName) -> None:
    s2 = torch.rand(F)
    assert torch.equal(select(s2, policy, 0.5, seed=1), select(s2, policy, 0.5, seed=1))
    assert not torch.equal(select(s2, policy, 0.5, seed=1), select(s2, policy, 0.5, seed=2))


def test_largest_seed_is_taken() -> None:
    select(torch.rand(F), "random", 0.5, seed=2**64 - 1)


def test_topk_sampled_holds_the_larger_half_of_topk_for_odd_k() -> None:
    s2 = torch.rand(F)
    k = 51
    experts = select(s2, "topk_sampled", k / F)
    assert len(experts) == k
    best = torch.topk(s2, 26).indices
    assert torch.isin(best, experts).all()


@pytest.mark.parametrize(("share", "ranked"), [(0.0, 0), (0.3, 30), (0.301, 31), (1.0, 100)])
def test_topk_sampled_takes_its_share_by_rank_and_draws_the_rest(share: float, ranked: int) -> None:
    """Were more taken by rank, every seed's set would hold the next neuron too."""
    s2 = torch.arange(F, 0, -1).float()
    parameters = SelectionParameters(topk_share=share)
    in_all = torch.ones(F, dtype=torch.bool)
    for seed in range(200):
        selection = Selection(density=0.5, policy="topk_sampled", parameters=parameters, seed=seed)
        experts = select_experts(s2[None], selection, magnitude=lambda: s2[None]).experts
        assert len(experts) == 100
        in_all &= torch.isin(torch.arange(F), experts)
    assert in_all.nonzero().flatten().tolist() == list(range(ranked))


def test_a_parameter_of_another_policy_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"topk_share: got 0\.5 with policy topk"):
        Selection(density=0.5, parameters=SelectionParameters(topk_share=0.5))


def test_sampled_draws_in_proportion_to_s() -> None:
    """First draws of many seeds: frequencies follow s, not s²."""
    s2 = torch.tensor([1.0, 4.0, 9.0, 0.0])
    counts = torch.zeros(4)
    for seed in range(3000):
        counts[select(s2, "sampled", 0.25, seed=seed).long()] += 1
    expected = torch.tensor([1.0, 2.0, 3.0, 0.0]) / 6
    torch.testing.assert_close(counts / 3000, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in CALIBRATED_POLICIES])
def test_a_layers_set_depends_on_that_layer_alone(policy: PolicyName) -> None:
    def sets(s2: torch.Tensor) -> torch.Tensor:
        selection = Selection(density=0.3, policy=policy, seed=5)
        return select_experts(s2, selection, magnitude=lambda: s2).table

    s2, other = torch.rand(3, F), torch.rand(3, F)
    mixed = torch.stack([other[0], s2[1], other[2]])
    assert torch.equal(sets(s2)[1], sets(mixed)[1])
    assert torch.equal(sets(s2)[:2], sets(s2[:2]))


@pytest.mark.parametrize("policy", CALIBRATED_POLICIES)
@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9, 1.0])
def test_calibrated_policies_keep_as_many_neurons_in_all_and_no_layer_under_half_of_its_share(
    policy: PolicyName, density: float
) -> None:
    selection = Selection(density=density, policy=policy)
    statistics = Statistics(sums=torch.rand((3, 5, F)) ** 4, tokens=7)
    slim = select_experts(
        statistics, selection, magnitude=lambda: statistics.s2, calibration=made_up(5, F)
    )
    k = selection.count(F)
    assert sum(slim.counts) == 5 * k
    assert min(slim.counts) >= max(1, k / 2)
    assert (len(set(slim.counts)) > 1) == (density < 1)


def test_sensitive_takes_the_largest_mean_square_times_sensitivity_of_all_layers() -> None:
    calibration = made_up(3, F, seed=4)
    sums, tokens = torch.rand((3, 3, F)), 48
    slim = select_experts(
        Statistics(sums=sums, tokens=tokens),
        Selection(density=0.5, policy="sensitive"),
        magnitude=lambda: sums[0],
        calibration=calibration,
    )
    mean = (sums[1].double() + 16 * calibration.mean_squares.double()) / (tokens + 16)
    score = mean * calibration.sensitivity.double()
    taken = slim.mask()
    # What is left out scores less than every expert of a layer that has more than its floor.
    above_floor = [layer for layer, count in enumerate(slim.counts) if count > 50]
    least = min(float(score[layer][taken[layer]].min()) for layer in above_floor)
    assert float(score.masked_fill(taken, 0).max()) <= least and len(above_floor) >= 2
    for layer in range(3):
        kept = score[layer][taken[layer]].min()
        assert kept >= score[layer][~taken[layer]].max()


def test_budgets_do_not_look_at_the_prompt_and_their_experts_do() -> None:
    calibration = made_up(3, F)
    one, other = (
        select_experts(
            torch.rand(3, F),
            Selection(density=0.4, policy="topk_budgets"),
            magnitude=lambda: torch.rand(3, F),
            calibration=calibration,
        )
        for _ in range(2)
    )
    assert one.counts == other.counts and len(set(one.counts)) == 3
    assert not torch.equal(one.experts, other.experts)


@pytest.mark.parametrize("policy", CALIBRATED_POLICIES)
def test_policies_that_read_a_calibration_are_refused_without_one(policy: PolicyName) -> None:
    with pytest.raises(InvalidRequest, match=rf"policy: got {policy} for a model without a cal"):
        Selection(density=0.5, policy=policy).check(None)
    with pytest.raises(InvalidRequest, match="run griffin calibrate"):
        default_selection(0.5, policy=policy)


def test_what_requests_get_that_set_nothing() -> None:
    plain = default_selection(0.5)
    assert (plain.policy, plain.correction.kind, plain.correction.rank) == ("topk", "bias", 0)
    recipe = Recipe(policy="sensitive", correction="residual", rank=32)
    found = default_selection(0.5, calibration=made_up(3, F, recipe=recipe))
    assert found.policy == "sensitive" and found.correction.rank == 32
    asked = default_selection(0.5, policy="topk", correction="none", calibration=made_up(3, F))
    assert asked == Selection(density=0.5)
    assert default_selection(0.5, correction="residual").correction.rank == 64
