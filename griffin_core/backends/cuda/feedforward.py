"""FF blocks on experts, read by index from a layer's resident weights.

A set is an address of int32 neuron numbers and their count, both read from tables in device memory,
so that a captured graph runs on whatever stands there. Without tables, all neurons are run. Down
projections are split over the neurons and summed in a fixed order, so results repeat to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.cpu.rows import ACTIVATION_CODES
from griffin_core.backends.cuda import expert_matmul, expert_matvec
from griffin_core.backends.cuda.activation import activate_own
from griffin_core.backends.cuda.expert_table import ExpertTable
from griffin_core.backends.cuda.tuning import others_may_begin_and_i_wait, overlap
from griffin_core.model.feedforward import FeedForward, Neurons

MAX_SHARED_TOKENS = 64
SUM_BLOCK = 256


def feedforward(
    x: Tensor,
    neurons: Neurons,
    table: ExpertTable | None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """An FF block on experts, of x [N, D], with N at most ``MAX_SHARED_TOKENS`` if they share.

    Args:
        x: bfloat16 or float16, contiguous.
        neurons: all of the layer.
        table: whose set each token runs on; None for all neurons.
        norm: weight [D] float32 and eps of an RMSNorm over x first; not for a shared set.
        residual: [N, D], added behind.

    Returns:
        [N, D].
    """
    tokens, width = x.shape
    if table is not None and table.shared:
        assert norm is None and tokens <= MAX_SHARED_TOKENS
        z = expert_matmul.activations(x, neurons, table)
        partial, splits = expert_matmul.down(z, neurons, table)
    else:
        z = expert_matvec.activations(x, neurons, table, norm)
        partial, splits = expert_matvec.down(z, neurons, table)
    out = torch.empty_like(x)
    _sum_splits[(triton.cdiv(width, SUM_BLOCK), tokens)](
        partial,
        neurons.down_bias,
        residual,
        splits,
        out,
        width,
        HAS_BIAS=neurons.down_bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK=SUM_BLOCK,
        **overlap(),
    )
    return out


def feedforward_on_all(
    x: Tensor, ff: FeedForward, neurons: Neurons, table: ExpertTable | None
) -> Tensor:
    """An FF block whose weights are all read once for all rows of x [N, D], each row's activations
    zeroed outside its own set: what private sets give, at what dense costs.

    Args:
        x: bfloat16 or float16, contiguous.
        ff: of all of the layer's ``neurons``.
        table: whose set each row runs on, of ``IndexSets``; None for all neurons.

    Returns:
        [N, D].
    """
    code = ACTIVATION_CODES[neurons.activation]
    return ff.output(activate_own(ff.inner(x), code, table, gated=neurons.gated))


@triton.jit
def _sum_splits(
    partial,
    bias,
    residual,
    splits,
    out,
    width,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    others_may_begin_and_i_wait(OVERLAPS)
    token = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(
            partial + (token * splits + split) * width + columns, mask=inside, other=0.0
        )
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)
