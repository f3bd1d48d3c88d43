"""FF blocks on experts, read by index from a layer's resident weights.

The sets are read from tensors, so that a captured graph can be replayed with other sets. Without
sets, all neurons run. Down projections are split over the neurons and summed in a fixed order, so
results are bitwise reproducible.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from griffin_core.backends.cuda import expert_matmul, expert_matvec
from griffin_core.backends.cuda.expert_rows import ExpertRows
from griffin_core.backends.cuda.tuning import pdl_options, pdl_wait
from griffin_core.spec.weights import FFWeights

MAX_SHARED_TOKENS = 64
SUM_BLOCK = 256


def feedforward(
    x: Tensor,
    weights: FFWeights,
    sets: ExpertRows | None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Runs an FF block on experts for x [N, D]; N is at most ``MAX_SHARED_TOKENS`` for a shared
    set.

    Args:
        x: bfloat16 or float16, contiguous.
        weights: all neurons of the layer.
        sets: the expert set of each row; None for all neurons.
        norm: weight [D] float32 and eps of an RMSNorm applied to x first; not for a shared set.
        residual: [N, D], added to the result.

    Returns:
        [N, D].
    """
    tokens, width = x.shape
    if sets is not None and sets.shared:
        assert norm is None and tokens <= MAX_SHARED_TOKENS
        z, mapped = expert_matmul.activations(x, weights, sets)
        partial, splits = expert_matmul.down(z, mapped, weights, sets)
    else:
        z, mapped = expert_matvec.activations(x, weights, sets, norm)
        partial, splits = expert_matvec.down(z, mapped, weights, sets)
    correction = None if sets is None else sets.correction
    out = torch.empty_like(x)
    _sum_splits[(triton.cdiv(width, SUM_BLOCK), tokens)](
        partial,
        weights.down_bias,
        correction and correction.bias,
        sets.slim_ids if sets else None,
        residual,
        splits,
        out,
        width,
        HAS_BIAS=weights.down_bias is not None,
        HAS_CORRECTION=correction is not None,
        SHARED=sets is not None and sets.shared,
        HAS_RESIDUAL=residual is not None,
        BLOCK=SUM_BLOCK,
        **pdl_options(),
    )
    return out


@triton.jit
def _sum_splits(
    partial,
    bias,
    corrections,
    slim_ids,
    residual,
    splits,
    out,
    width,
    HAS_BIAS: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pdl_wait(OVERLAPS)
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
    if HAS_CORRECTION:
        slim_id = tl.load(slim_ids if SHARED else slim_ids + token)
        own = corrections + slim_id * width + columns
        total += tl.load(own, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)
