"""Matrix products with weights that stay: given once, laid out for the library that multiplies."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS_HINT = 16
"""For how many rows oneDNN is asked to choose its layout. Of 1, 4, 16 and 512, the one that is
within 5 % of the best at every number of rows from 1 to 512 (docs/LOG.md)."""


class Linear:
    """y = x Wᵀ + b.

    On a CPU the weight is kept in oneDNN's own blocked layout and nowhere else: a plain product
    repacks it, or reads it badly, at every call. A row of the result does not depend, to the bit,
    on how many other rows there are.

    Args:
        weight: [out, in].
        bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        packs = weight.device.type == "cpu" and _onednn_multiplies(weight.dtype)
        self._packed = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
            if packs
            else None
        )
        self._weight = None if packs else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if self._weight is not None:
            return F.linear(x, self._weight, self._bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


def linear_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Most bytes a Linear of a weight [rows, columns] holds: blocks are padded."""
    return -(-rows // 64) * 64 * (-(-columns // 64) * 64) * dtype.itemsize


@cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has this product on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32
