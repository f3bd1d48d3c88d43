"""The statistic by which experts are chosen (arXiv 2404.01365, section 4.2).

For activations Z [T, F] of one layer, each token's row is scaled to unit l2 norm and s is the l2
norm of each neuron's column: s_f = sqrt(Σ_t (Z_tf / ‖Z_t‖)²). The code stores s2 = s², because s2
is additive over disjoint runs of tokens: the s2 of chunks, cached prefixes and later turns is
summed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_core.backends.statistic import TINY
from griffin_core.backends.statistic import statistic as s2_of

__all__ = ["group_score", "relative", "s2_of"]


def relative(z: Tensor) -> Tensor:
    """Returns |Z_t| / ‖Z_t‖ for activations [T, F] of any float dtype, as float32: the values that
    the statistic squares and sums. A row that adds nothing to the statistic is zero."""
    row = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float32)
    return torch.where(row.square() >= TINY, z.abs().float() / row, 0.0)


def group_score(s2s: Sequence[Tensor]) -> Tensor:
    """Returns one score for a group of prompts: Σ_i s_i / √S_i, [..., F] float32, where S_i is the
    number of tokens of prompt i (arXiv 2404.01365, section 4.3, batched form).

    Args:
        s2s: s2 [..., F] of each prompt. S_i is computed as Σ s2_i, the number of tokens that
            counted; a prompt with none adds nothing.

    Raises:
        ValueError: there is no prompt.
    """
    if not s2s:
        raise ValueError("group_score needs the statistic of at least one prompt")
    score = torch.zeros_like(s2s[0])
    for s2 in s2s:
        tokens = s2.sum(dim=-1, keepdim=True)
        score += (s2 / tokens.clamp(min=TINY)).sqrt()
    return score
