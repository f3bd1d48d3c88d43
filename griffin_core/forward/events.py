"""What a prefill makes, one event after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_core.experts.correction import LayerCorrection
from griffin_core.experts.correction_fit import Tail
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.experts.statistic import Statistics


@dataclass(frozen=True, kw_only=True)
class LayerKv:
    """An event: one layer's keys and values for a run of tokens.

    Args:
        kv: [2, kv_heads, tokens, head_dim], keys then values. A view of the prompt's cache.
        ready: on a GPU, an event after which the values are valid; None if they are valid already
            or become so in stream order.
    """

    layer: int
    first_token: int
    kv: Tensor
    ready: torch.cuda.Event | None = None


@dataclass(frozen=True, kw_only=True)
class LayerExperts:
    """An event: one layer's statistics over all tokens, and its experts.

    Args:
        sums: [3, F] float32, as of ``Statistics``. s2 is the exact square of a float32 number, so
            that sending its root to another server does not change it.
        experts: [K] int32, ascending.
        correction: what stands in for the other neurons.
    """

    layer: int
    sums: Tensor
    experts: Tensor
    correction: LayerCorrection | None = None

    @property
    def s2(self) -> Tensor:
        """[F] float32, the square of the paper's statistic."""
        return self.sums[0]


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """An event: one layer's relative activations for a run of tokens, for analysis.

    Args:
        values: [tokens, F] float32, |Z_t| / ‖Z_t‖: the values that the statistic squares and sums.
    """

    layer: int
    first_token: int
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class PromptExperts:
    """An event: the statistics and the experts of all layers, for a prompt that an engine has
    prefilled for its own session. Its KV is in the session's cache already.

    Args:
        statistics: over all tokens of the session so far.
        norm_mass: L values, as of ``SlimSpec.norm_mass``.
        tails: what a residual is to be fitted to; see ``forward.correction``. The experts have no
            correction yet: the first token does not wait for one.
        hidden: [T, D], what the head reads after each token, if the prompt was asked for it.
    """

    statistics: Statistics
    slim: SlimSpec
    norm_mass: tuple[float, ...]
    tails: Sequence[Sequence[Tail]] = ()
    hidden: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PrefillFinished:
    """An event: the end of a prefill.

    A pass runs several prompts at once, so its time is divided among them: the model's time in
    proportion to their tokens, the selection's time equally among those that chose experts. The
    times of all prompts add up to the time that the device was busy.

    Args:
        last_hidden: [D] float32, the input of the head for the first token's logits.
        compute_s: this prompt's share of running the model, selection included.
        selection_s: its share of choosing experts.
    """

    last_hidden: Tensor
    compute_s: float
    selection_s: float


@dataclass(frozen=True, kw_only=True)
class PrefillRestarted:
    """An event: another server starts the prefill again, so all earlier events must be
    discarded."""


PrefillEvent = LayerKv | LayerExperts | PromptExperts | PrefillFinished | PrefillRestarted
