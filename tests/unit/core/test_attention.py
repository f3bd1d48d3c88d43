"""Which tokens a query sees, in whatever form the device takes it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from griffin_core.backends.attention import AttentionMask, attend, attention_mask


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("heads", [2, 6])
@torch.inference_mode()
def test_the_form_without_a_mask_shows_what_the_mask_does(
    heads: int, softcap: float | None
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(5, heads, 16), torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    masked = attention_mask(7, 5, None, torch.device("cpu"))
    assert masked.mask is not None
    shifted = AttentionMask(first=0, causal=False, mask=None, shifted=causal_lower_right(5, 12))
    got, exact = (attend(q, k, v, seen, 0.25, softcap) for seen in (shifted, masked))
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)
