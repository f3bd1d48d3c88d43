"""Memory that is not written holds NaN, so that a result that depends on it shows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every floating tensor that is made without values with NaN."""
    made: Callable[..., Tensor] = torch.empty
    like, of = torch.empty_like, Tensor.new_empty

    def fill(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(made(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: fill(of(*a, **k)))
