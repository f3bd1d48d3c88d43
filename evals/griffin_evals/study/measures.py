"""Measures of activations, expert sets and log-probabilities, as pure functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STEADY = 0.75
"""A neuron is steady if it lies in the strongest half of at least this share of the tokens."""


def strongest(values: Tensor, k: int) -> Tensor:
    """Each token's k strongest neurons: relative activations [T, F] -> bool [T, F]. Neurons with
    activation 0 are never among them; all neurons equal to the k-th are."""
    # numpy selects in linear time; topk sorts, which took longer than reading the prompt.
    weakest = values.shape[1] - k
    least = np.partition(values.numpy(), weakest, axis=1)[:, weakest : weakest + 1]
    return (values >= torch.from_numpy(least)) & (values > 0)


def permuted(values: Tensor, seed: int) -> Tensor:
    """The null hypothesis without flocking: each token's activations [T, F] shuffled among the
    neurons, independently of the other tokens."""
    return torch.from_numpy(np.random.default_rng(seed).permuted(values.numpy(), axis=1))


def steady_share(own: Tensor) -> float:
    """Share of the neurons that are steady; own: bool [T, F], each token's strongest half. It is at
    most 1 / (2 · STEADY) if each token marks half of the neurons."""
    return float((own.float().mean(dim=0) >= STEADY).float().mean())


def agreement(own: Tensor, experts: Tensor) -> float:
    """Mean over tokens of the share of a token's own strongest neurons that the experts hold.

    Args:
        own: bool [T, F], K of them in each row.
        experts: [K] int32.
    """
    by_neuron = own.sum(dim=0)
    return float(by_neuron[experts.long()].sum() / by_neuron.sum())


def norm_mass(s2: Tensor, experts: Tensor) -> Tensor:
    """Returns the share of each layer's statistic s2 [L, F] that experts [L, K] hold: [L]."""
    return s2.gather(1, experts.long()).sum(dim=1) / s2.sum(dim=1)


def members(experts: Tensor, intermediate_size: int) -> Tensor:
    """Experts [L, K] int32 -> bool [L, F]."""
    inside = torch.zeros((experts.shape[0], intermediate_size), dtype=torch.bool)
    return inside.scatter_(1, experts.cpu().long(), True)


def overlap(one: Tensor, other: Tensor) -> float:
    """Share of the experts of one set that the other holds too, mean over layers.

    Args:
        one, other: bool [L, F] with equally many members in each layer.
    """
    return float((one & other).sum() / one.sum())


def jaccard(one: Tensor, other: Tensor) -> Tensor:
    """|A ∩ B| / |A ∪ B| for each layer of bool [L, F]: [L]."""
    return (one & other).sum(dim=1) / (one | other).sum(dim=1)


def jaccard_of_random_sets(k: int, intermediate_size: int) -> float:
    """k / (2F - k), since two random sets of k out of F neurons share k²/F on average."""
    return k / (2 * intermediate_size - k)


def divergence(dense: Tensor, slim: Tensor) -> Tensor:
    """KL(dense || slim) of log-probabilities [T, V], in nats: [T]."""
    # Row by row, so that intermediate values stay in the CPU's cache.
    rows = zip(dense, slim, strict=True)
    return torch.stack([torch.dot(one.exp(), one - other) for one, other in rows])


def same_first_choice(dense: Tensor, slim: Tensor) -> Tensor:
    """1 where both have the same most likely token, for log-probabilities [T, V]: float [T]."""
    return (dense.argmax(dim=1) == slim.argmax(dim=1)).float()


def negative_log_likelihood(logprobs: Tensor, targets: Sequence[int]) -> Tensor:
    """Returns the negative log-likelihood, in nats, of the token that follows each row of
    log-probabilities [T, V]: [T]."""
    index = torch.tensor(list(targets), device=logprobs.device)
    return -logprobs.gather(1, index[:, None])[:, 0]


def distinct_share(token_ids: Sequence[int], width: int = 4) -> float:
    """Share of the runs of ``width`` tokens that are distinct: near 0 for a text that repeats
    itself, 1 for one that never does."""
    runs = list(zip(*(token_ids[i:] for i in range(width)), strict=False))
    return len(set(runs)) / len(runs)
