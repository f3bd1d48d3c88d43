"""What all GPU tests share."""

from __future__ import annotations

import pytest

from tests.gpu.devices import DEVICE

if DEVICE is not None:
    from griffin_core.backends.cuda import expert_matmul, expert_matvec, matvec


@pytest.fixture(autouse=True)
def first_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling all that are to choose from, for every variant, would take many minutes."""
    if DEVICE is None:
        return
    for module in (expert_matmul, expert_matvec, matvec):
        for kernel in vars(module).values():
            if hasattr(kernel, "configs"):
                monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
