"""How many experts each layer has."""

from __future__ import annotations

import math

from griffin_core.experts.parameters import SelectionParameters


def expert_counts(
    density: float, parameters: SelectionParameters, layers: int, intermediate_size: int
) -> tuple[int, ...]:
    """Returns K of each layer: the same for all, max(1, floor(F · density)).

    It is known before the prompt is read, because memory is reserved and both ends of a handoff are
    told by it.

    Args:
        density: the fraction of neurons to keep, in (0, 1].
        parameters: of the selection; none of them changes the counts today.
        layers: L.
        intermediate_size: F.
    """
    # Rounded first: 100 * 0.29 is 28.999999999999996, but the user means 29.
    return (max(1, math.floor(round(intermediate_size * density, 6))),) * layers
