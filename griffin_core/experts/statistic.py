"""The statistics by which experts are chosen, and what is left out is estimated.

For activations Z [T, F] of one layer, each token's row is scaled to unit l2 norm and s is the l2
norm of each neuron's column: s_f = sqrt(Σ_t (Z_tf / ‖Z_t‖)²) (arXiv 2404.01365, section 4.2). The
code stores s2 = s². Beside it are kept Σ_t Z_tf² and Σ_t Z_tf, from which come the mean square of a
neuron (policy ``sensitive``) and its mean (``Correction.bias``). All three are additive over
disjoint runs of tokens: those of chunks, cached prefixes and later turns are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_core.backends.statistic import TINY
from griffin_core.backends.statistic import statistic as sums_of

__all__ = ["Statistics", "group_score", "relative", "sums_of"]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is kept of the activations of some tokens in all layers.

    Args:
        sums: [3, L, F] float32: s2, Σ_t Z_tf² and Σ_t Z_tf.
        tokens: T, the number of tokens.
    """

    sums: Tensor
    tokens: int

    @staticmethod
    def of_score(s2: Tensor) -> Statistics:
        """Wraps an s2 [L, F], or any score in the same order, for policies that read nothing else.
        The other sums are zero."""
        return Statistics(sums=torch.stack([s2, *2 * [torch.zeros_like(s2)]]), tokens=0)

    @property
    def s2(self) -> Tensor:
        """[L, F]: Σ_t Z_tf² / ‖Z_t‖²."""
        return self.sums[0]

    @property
    def squares(self) -> Tensor:
        """[L, F]: Σ_t Z_tf²."""
        return self.sums[1]

    @property
    def values(self) -> Tensor:
        """[L, F]: Σ_t Z_tf."""
        return self.sums[2]

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both runs of tokens, which must be disjoint."""
        return Statistics(sums=self.sums + other.sums, tokens=self.tokens + other.tokens)

    def clone(self) -> Statistics:
        """A copy that no later pass changes."""
        return Statistics(sums=self.sums.clone(), tokens=self.tokens)

    def cpu(self) -> Statistics:
        """A copy in the CPU's memory."""
        return Statistics(sums=self.sums.cpu(), tokens=self.tokens)

    def rooted(self) -> Statistics:
        """The same with s2 rounded to the square of a float32 root. Servers send the root, so that
        the statistic of a prompt is bitwise the same whichever server prefills it."""
        s2 = self.s2.sqrt().square()
        return Statistics(sums=torch.cat([s2[None], self.sums[1:]]), tokens=self.tokens)


def relative(z: Tensor) -> Tensor:
    """Returns |Z_t| / ‖Z_t‖ for activations [T, F] of any float dtype, as float32: the values that
    s2 squares and sums. A row that adds nothing to s2 is zero."""
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
