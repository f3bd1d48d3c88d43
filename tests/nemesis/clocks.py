"""How fast the clocks of a world run: as shipped, or so fast that a hundred runs take minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """The time-outs of a world, and how long its faults last.

    Args:
        pace: how slow the clocks are that are no settings. At 1 each is a second or less, at 2 it
            is twice as long, and None leaves them as they are.
        settings: flags of `griffin serve` that set the time-outs of all servers.
        deadline_s: the deadline of each call.
        short_s: the longest time of a fault that is noticed at once.
        pings_s: the longest time of a fault that is noticed because pings are not answered.
        handoff_s: the longest time of a fault that is noticed by ``--handoff-timeout-s``.
        least: the shortest time of a fault, as a share of the longest.
        reader_s: the time within which a client that does not read must be ended.
        stuck_s: the time within which a stuck engine must be noticed.
        ends_s: the time within which a server that is told to end must have ended.
        stuck_ends_s: the same for a server whose engine is stuck.
        recovers_s: the time within which a call must be answered again once a fault is over.
    """

    pace: float | None
    settings: tuple[str, ...]
    deadline_s: float
    short_s: float
    pings_s: float
    handoff_s: float
    least: float
    reader_s: float
    stuck_s: float
    ends_s: float
    stuck_ends_s: float
    recovers_s: float


def hurried(pace: float) -> Clocks:
    """Clocks of a second or less at pace 1, and of more on a machine that has other work."""
    return Clocks(
        pace=pace,
        settings=(
            f"--handoff-timeout-s={pace}",
            f"--reader-timeout-s={0.8 * pace}",
            f"--stuck-after-s={0.8 * pace}",
            f"--shutdown-grace-s={pace}",
            f"--max-call-s={60 * pace}",  # longer than a whole run
        ),
        deadline_s=8 * pace,
        short_s=0.5,
        pings_s=2.5 * pace,
        handoff_s=2 * pace,
        least=0.1,
        reader_s=20 * pace,
        stuck_s=10 * pace,
        ends_s=10 * pace,
        stuck_ends_s=5 * pace,
        recovers_s=10 * pace,
    )


AS_SHIPPED = Clocks(
    pace=None,
    settings=(),
    deadline_s=240,
    short_s=1,
    pings_s=40,
    handoff_s=140,
    least=0.9,
    reader_s=120,
    stuck_s=90,
    ends_s=40,
    stuck_ends_s=20,
    recovers_s=40,
)
"""What users have who set nothing: prefill servers are pinged for 15 s, clients' and servers'
connections for 30 s, a handoff may be silent for 120 s, and a reader for 60 s."""


def pings(pace: float) -> dict[str, Any]:
    """The gRPC options of a connection whose pings run so fast."""
    return {
        "grpc.keepalive_time_ms": int(400 * pace),
        "grpc.keepalive_timeout_ms": int(1000 * pace),
        "grpc.http2.ping_timeout_ms": int(1000 * pace),
        "grpc.http2.min_ping_interval_without_data_ms": 10,
        "grpc.http2.max_ping_strikes": 0,
    }
