"""The statistic by which experts are chosen (arXiv 2404.01365, section 4.2).

For activations Z [T, F] of one layer, each token's row is scaled to unit l2 norm and s is the l2
norm of each neuron's column: s_f = sqrt(Σ_t (Z_tf / ‖Z_t‖)²). What is kept is s2 = s², because s2
is additive over disjoint runs of tokens: chunks, cached prefixes and later turns just add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from griffin_core.backends.cpu.statistic import s2_rows
from griffin_core.backends.cpu.team import runs_kernels
from griffin_core.backends.cuda import on_device, runs_cuda_kernels

_TINY = torch.finfo(torch.float32).tiny
"""Below, a reciprocal is infinite."""


def s2_of(z: Tensor) -> Tensor:
    """Activations [T, F] of any float dtype -> s2 [F] float32.

    Rows are scaled in float32, whatever the dtype of ``z`` (squares of float16 overflow). A zero
    row, which ReLU can give, adds nothing; so does one whose squares underflow (norm < 1e-19).
    Summed over neurons, s2 is the number of the other rows. Only real tokens may be in ``z``:
    padding would be counted.
    """
    if runs_kernels(z.dtype, z.device):
        return s2_rows(z)
    squares = z.float().square()
    row = squares.sum(dim=1)
    weight = torch.where(row >= _TINY, row.reciprocal(), torch.zeros_like(row))
    return weight @ squares


def relative(z: Tensor) -> Tensor:
    """|Z_t| / ‖Z_t‖ of activations [T, F] of any float dtype, float32: what ``s2_of`` squares and
    adds up. A row that adds nothing there is zero."""
    row = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float32)
    return torch.where(row.square() >= _TINY, z.abs().float() / row, 0.0)


@dataclass(frozen=True, kw_only=True)
class RowRuns:
    """R runs of rows, one after the other, that fill a batch.

    Args:
        bounds: R + 1 numbers: run r is rows bounds[r] to bounds[r + 1].
        on_device: the same, [R + 1] int32.
    """

    bounds: tuple[int, ...]
    on_device: Tensor

    @staticmethod
    def of(bounds: Sequence[int], device: torch.device) -> RowRuns:
        """Of bounds on the host; a GPU is not waited for."""
        return RowRuns(bounds=tuple(bounds), on_device=on_device(bounds, torch.int32, device))


def add_s2(s2: Tensor, z: Tensor, squares: Tensor | None, runs: RowRuns) -> None:
    """Adds the statistic of each run of rows of activations Z [N, F] to its row of s2 [R, F]
    float32, in place. On a GPU that is one kernel for all runs.

    Args:
        s2: its rows may lie apart.
        squares: [N, n] float32, of which each row sums to that row's ‖Z_t‖²; None if not known.
    """
    if squares is not None and runs_cuda_kernels(z.dtype, z.device):
        from griffin_core.backends.cuda.statistic import add_s2_columns  # noqa: PLC0415  # needs triton

        add_s2_columns(s2, z, squares, runs.on_device)
    else:
        for run, (begin, end) in enumerate(pairwise(runs.bounds)):
            s2[run] += s2_of(z[begin:end])


def group_score(s2s: Sequence[Tensor]) -> Tensor:
    """One score for a group of prompts: Σ_i s_i / √S_i, [..., F] float32, where S_i is prompt i's
    number of tokens (arXiv 2404.01365, section 4.3, batched form).

    Args:
        s2s: s2 [..., F] of each prompt. S_i is taken as Σ s2_i, the tokens that counted; a prompt
            with none adds nothing.

    Raises:
        ValueError: no prompt.
    """
    if not s2s:
        raise ValueError("group_score needs the statistic of at least one prompt")
    score = torch.zeros_like(s2s[0])
    for s2 in s2s:
        tokens = s2.sum(dim=-1, keepdim=True)
        score += (s2 / tokens.clamp(min=_TINY)).sqrt()
    return score
