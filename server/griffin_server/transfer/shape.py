"""The shape of a handoff, on which both servers must agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from griffin_core.engine.task import PrefillTask
from griffin_core.experts.correction import NO_CORRECTION, CorrectionParams
from griffin_core.model.load import Model
from griffin_core.spec.choices import CALIBRATED_POLICIES


@dataclass(frozen=True, kw_only=True)
class HandoffShape:
    """The dimensions by which both servers read the same bytes alike.

    Args:
        tokens: T, the tokens of this prompt.
        experts: the number of experts of all layers together.
        uneven: whether layers may have different numbers of them.
        correction: the most that may stand in for the other neurons of so long a prompt.
    """

    fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    ff_width: int
    width: int
    dtype: torch.dtype
    tokens: int
    experts: int
    uneven: bool = False
    correction: CorrectionParams = NO_CORRECTION

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        """Bytes of all tokens' keys and values in all layers."""
        return self.layers * self.tokens * self.token_bytes

    def bytes_by_kind(self) -> dict[str, int]:
        """The most bytes of a complete handoff: KV, statistics, experts, correction, last hidden
        state."""
        return {
            "kv": self.kv_bytes,
            "statistic": self.layers * self.ff_width * 12,
            "experts": 4 * self.experts,
            "correction": self.correction.nbytes(self.layers, self.width, self.dtype.itemsize),
            "hidden": self.width * 4,
        }


def handoff_shape(model: Model, task: PrefillTask) -> HandoffShape:
    """The shape of a task's handoff from or to ``model``."""
    spec = model.decoder.spec
    return HandoffShape(
        fingerprint=model.fingerprint,
        layers=len(spec.layers),
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        ff_width=spec.intermediate_size,
        width=spec.hidden_size,
        dtype=model.decoder.dtype,
        tokens=len(task.token_ids),
        experts=len(spec.layers) * task.selection.count(spec.intermediate_size),
        uneven=task.selection.policy in CALIBRATED_POLICIES,
        correction=task.selection.correction_for(len(task.token_ids)),
    )
