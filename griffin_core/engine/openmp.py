"""How long OpenMP's threads spin for one another before they sleep.

Between two products a team of threads waits for the next one. By default libgomp lets a thread spin
for milliseconds, which is right while it has a CPU of its own. When other programs are busy, the
thread that it waits for may not be running, and the spinning thread keeps the CPU from it: next to
two busy loops a server ran at 0.27 of its speed (docs/LOG.md). A short spin costs nothing
measurable on an idle machine, since the gaps between two products of a step are shorter than the
spin.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

SPIN_COUNT = 10_000
"""Iterations of libgomp's waiting loop, about 0.1 to 0.4 ms. Of 1,000, 10,000 and 100,000 this was
the best next to two busy loops, and on an idle machine it was as fast as libgomp's default of
300,000."""

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Environment variables with which an operator decides instead."""


def wait_briefly(environment: MutableMapping[str, str]) -> bool:
    """Makes OpenMP's threads spin briefly, unless the environment says how they wait.

    libgomp reads its variables when it is loaded, and torch loads it. Once torch is imported this
    has no effect, so it sets nothing then.

    Args:
        environment: the environment of this process.

    Returns:
        Whether the variable was set.
    """
    if "torch" in sys.modules or any(name in environment for name in SETTINGS):
        return False
    environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    return True
