"""How many experts each layer has."""

from __future__ import annotations

import math

from griffin_core.experts.parameters import SelectionParameters


def expert_counts(
    density: float, parameters: SelectionParameters, layers: int, ff_width: int
) -> tuple[int, ...]:
    """Returns K of each layer: the same for all, max(1, floor(F · density)).

    It is known before the prompt is read, because memory is reserved and both ends of a handoff are
    told by it.

    Args:
        density: the fraction of neurons to keep, in (0, 1].
        parameters: of the selection; none of them changes the counts today.
        layers: L.
        ff_width: F.
    """
    # Rounded first: 100 * 0.29 is 28.999999999999996, but the user means 29.
    return (max(1, math.floor(round(ff_width * density, 6))),) * layers
