"""Selection policies."""

from __future__ import annotations

import pytest
import torch

from griffin_core.errors import InvalidRequest
from griffin_core.experts import densities
from griffin_core.experts.parameters import SelectionParameters
from griffin_core.experts.policies import POLICIES, PolicyName
from griffin_core.experts.selection import Selection, select_experts
from griffin_core.experts.slim_spec import SlimSpec

F = 200


def select(s2: torch.Tensor, policy: PolicyName, density: float, seed: int = 0) -> torch.Tensor:
    """Of one layer, the second of three."""
    return select_experts(
        torch.stack([s2.flip(0), s2, torch.zeros_like(s2)]),
        Selection(density=density, policy=policy, seed=seed),
        magnitude=lambda: torch.arange(len(s2), 0, -1).float().expand(3, -1),
    ).layers[1]


@pytest.mark.parametrize(
    ("density", "k"),
    [(1.0, F), (0.5, 100), (0.499, 99), (0.29, 58), (0.001, 1), (1e-9, 1), (0.9999, 199)],
)
def test_k_is_floor_of_f_times_density_and_at_least_one(density: float, k: int) -> None:
    assert Selection(density=density).expert_counts(2, F) == (k, k)


def test_k_is_not_a_victim_of_binary_fractions() -> None:
    # 100 * 0.29 == 28.999999999999996
    assert Selection(density=0.29).expert_counts(1, 100) == (29,)


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
    assert len(experts) == Selection(density=density).expert_counts(1, F)[0]
    assert (experts[1:] > experts[:-1]).all()
    assert experts[0] >= 0 and experts[-1] < F


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_copes_with_a_prompt_that_fired_nothing(policy: PolicyName) -> None:
    assert len(select(torch.zeros(F), policy, 0.3)) == 60


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


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layers_set_depends_on_that_layer_alone(policy: PolicyName) -> None:
    def sets(s2: torch.Tensor) -> torch.Tensor:
        selection = Selection(density=0.3, policy=policy, seed=5)
        return select_experts(s2, selection, magnitude=lambda: s2).table

    s2, other = torch.rand(3, F), torch.rand(3, F)
    mixed = torch.stack([other[0], s2[1], other[2]])
    assert torch.equal(sets(s2)[1], sets(mixed)[1])
    assert torch.equal(sets(s2)[:2], sets(s2[:2]))


@pytest.mark.parametrize("policy", POLICIES)
def test_layers_may_have_different_numbers_of_experts(
    policy: PolicyName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer has the experts that it would have if all had its number."""
    s2, counts = torch.rand(3, F), (7, F, 60)

    def chosen(*counts: int) -> SlimSpec:
        monkeypatch.setattr(densities, "expert_counts", lambda *_: counts)
        selection = Selection(density=0.3, policy=policy, seed=5)
        return select_experts(s2, selection, magnitude=lambda: s2)

    slim = chosen(*counts)
    assert slim.counts == counts
    for layer, k in enumerate(counts):
        assert torch.equal(slim.layers[layer], chosen(k, k, k).layers[layer])
