"""Matrix products with weights that stay: given once, laid out for the library that multiplies."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from griffin_core.backends.cpu.rows import linear_row
from griffin_core.backends.cpu.team import runs_kernels

_ROWS_HINT = 16
"""For how many rows oneDNN is asked to choose its layout. Of 1, 4, 16 and 512, the one that is
within 5 % of the best at every number of rows from 1 to 512 (docs/LOG.md)."""


Rows = Literal["one", "many", "any"]
"""How many rows a product is laid out for. With others it is right too, but slower."""


class Linear:
    """y = x Wᵀ + b.

    On a CPU the weight is laid out in oneDNN's own blocks: a plain product lays it out anew, or
    reads it badly, at every call. In float32 a row of the result does not depend, to the bit, on
    how many other rows there are. In bfloat16 a single row has a kernel of its own, which reads the
    weight as it is.

    Args:
        weight: [out, in].
        bias: [out] or None.
        rows: see ``Rows``; "any" holds the weight in both layouts.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, rows: Rows = "any") -> None:
        self.bias = bias
        has_kernel = runs_kernels(weight.dtype, weight.device)
        packs = weight.device.type == "cpu" and _onednn_multiplies(weight.dtype)
        if has_kernel and rows == "one":
            packs = False
        self._packed = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
            if packs
            else None
        )
        self._runs_row = has_kernel and rows != "many" and weight.is_contiguous()
        self.weight = weight if self._runs_row or not packs else None
        """[out, in], unless only a copy in another layout is held."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if self._runs_row and x.shape[0] == 1:
            assert self.weight is not None
            return linear_row(x, self.weight, self.bias)
        if self._packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
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
