"""What a turn's pruning and its speculation did. Names that end in ``_bytes`` are bytes."""

from __future__ import annotations

from dataclasses import dataclass

from griffin_client.choices import Correction, Policy


@dataclass(frozen=True, kw_only=True)
class PruningFigures:
    """What the pruning of a turn did.

    Args:
        density: the fraction of the FF neurons that was asked for, in (0, 1].
        policy: how the experts were chosen.
        experts_per_layer: K, the number of neurons kept in each layer; the mean over layers,
            rounded down, where they differ.
        expert_counts: [L], K of each layer.
        ff_width: F, the number of neurons of each layer.
        mean_norm_mass: mean of ``norm_mass``.
        norm_mass: [L] floats in [0, 1]: the share of the prompt's activation norm that the experts
            of each layer hold. It does not measure the quality of the output.
        slim_view_bytes, kv_cache_bytes: memory that the session holds on the server.
        mean_density: mean, over the turn's tokens so far, of the share of the FF neurons that each
            token ran on; 0 before the first token. The first token comes from the dense pass over
            the prompt and counts as 1.
        dense_tokens: how many of these tokens ran on all neurons, the first one included.
        checked_tokens: how many of these tokens the server ran all neurons on once more.
        agreed_tokens: how many of those all neurons would have drawn too.
        agreement_floor: the floor that the density follows; None if it is fixed.
        correction: what was added to the output of the experts in place of the other neurons.
        correction_rank: of a residual.
        correction_bytes: memory that it takes; a part of ``slim_view_bytes``.
    """

    density: float
    policy: Policy
    experts_per_layer: int
    expert_counts: tuple[int, ...]
    ff_width: int
    mean_norm_mass: float
    norm_mass: tuple[float, ...]
    slim_view_bytes: int
    kv_cache_bytes: int
    mean_density: float
    dense_tokens: int
    correction: Correction = "none"
    correction_rank: int = 0
    correction_bytes: int = 0
    checked_tokens: int = 0
    agreed_tokens: int = 0
    agreement_floor: float | None = None

    @property
    def agreement(self) -> float | None:
        """The share of the checked tokens that the dense model draws too; None without checks."""
        return self.agreed_tokens / self.checked_tokens if self.checked_tokens else None


@dataclass(frozen=True, kw_only=True)
class SpeculationFigures:
    """The tokens of a turn that were drafted, and those that were accepted, by source: prompt
    lookup, and the model on the request's experts."""

    lookup_drafted: int = 0
    lookup_accepted: int = 0
    slim_drafted: int = 0
    slim_accepted: int = 0
