"""How many threads a step runs on: as many as there are CPUs that no other program uses.

A team of threads is as fast as its slowest one. With a busy program on a CPU of theirs, all of them
wait for the thread that shares it; one thread less leaves that CPU to the program and does
not wait (docs/LOG.md). So the engine looks five times a second at what others take of its CPUs.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from griffin_core.engine.cgroup import MEMBERSHIP, ROOT, quota_cpus

STAT = Path("/proc/stat")

INTERVAL_S = 0.2
"""Between two looks; the kernel counts CPU time in hundredths of a second."""

TOLERATED_CPUS = 0.4
"""What others may take of a CPU before it is left to them."""

CALM_S = 1.0
"""Seconds for which looks must allow more threads before there are more."""

MOST_COST = 0.005
"""Largest share of the time spent on looking; a machine of hundreds of CPUs takes a while to say
what they do."""


def allowed_cpus() -> frozenset[int]:
    """CPUs that the scheduler may put this thread on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def available_cpus(cgroup: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """CPUs the scheduler may put this process on, and no more than the quotas of its control groups
    pay for, rounded up. At least 1."""
    return max(1, math.ceil(min(len(allowed_cpus()), quota_cpus(cgroup, membership))))


@dataclass(frozen=True, kw_only=True)
class Look:
    """CPU time up to a moment.

    Args:
        at: seconds, on ``time.monotonic``.
        busy_s: CPU seconds that this process's CPUs have worked, for anybody.
        own_s: CPU seconds of this process, all its threads together.
    """

    at: float
    busy_s: float
    own_s: float


def busy_seconds(stat: str, cpus: frozenset[int], ticks_per_s: int) -> float:
    """CPU seconds that some CPUs have worked since the machine's start.

    Args:
        stat: the text of /proc/stat.

    Raises:
        ValueError, IndexError: it is no such text.
    """
    ticks = 0
    for line in stat.splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, irq, softirq = map(int, counts[:7])
            ticks += user + nice + system + irq + softirq
    return ticks / ticks_per_s


def look() -> Look | None:
    """Reads the clocks; None where the system does not tell (it is not Linux)."""
    try:
        text = STAT.read_text(encoding="ascii")
        busy_s = busy_seconds(text, allowed_cpus(), os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return None
    return Look(at=time.monotonic(), busy_s=busy_s, own_s=time.process_time())


def others_cpus(before: Look, after: Look) -> float:
    """CPUs that others kept busy between two looks."""
    busy_s, own_s = after.busy_s - before.busy_s, after.own_s - before.own_s
    return max(0.0, busy_s - own_s) / (after.at - before.at)


def threads_beside(others: float, *, most: int, cpus: int) -> int:
    """Threads to run beside programs that take ``others`` CPUs.

    Args:
        most: threads on an idle machine, by affinity and quota.
        cpus: CPUs that threads may be put on.

    Returns:
        One for each CPU that is left. At least half of ``most``: others that want all CPUs are not
        given way to without end.
    """
    free = math.floor(cpus - others + TOLERATED_CPUS)
    return max(1, most // 2, min(most, free))


class CpuShare:
    """The number of threads to run on, as the load of the machine changes. Owned by one thread.

    It is the least of what the looks of the last second allow: it falls with the first look that
    says so and rises slowly, since a thread too many costs more than one too few.

    Args:
        most: threads on an idle machine; None for ``available_cpus``.
        cpus: CPUs that threads may be put on; None for ``allowed_cpus``.
        look: reads the clocks.
    """

    def __init__(
        self,
        *,
        most: int | None = None,
        cpus: int | None = None,
        look: Callable[[], Look | None] = look,
    ) -> None:
        self._most = most or available_cpus()
        self._cpus = cpus or len(allowed_cpus())
        self._look = look
        self._last: Look | None = None
        self._due = 0.0
        self._allowed: deque[tuple[float, int]] = deque()  # when, and how many
        self.threads = self._most
        """How many to run on now."""

    def forget(self) -> None:
        """The process was idle: what others took of its CPUs meanwhile cost it nothing and says
        little about now. The next look begins anew, and the one after it may change ``threads``."""
        self._last = None
        self._allowed.clear()
        self._due = min(self._due, time.monotonic()) if self._due < math.inf else self._due

    def follow(self) -> bool:
        """Looks, if a look is due; to be called between steps. Whether ``threads`` has changed."""
        clock = time.monotonic()
        if self._most == 1 or clock < self._due:
            return False
        now = self._look()
        if now is None:  # nor will it be told later
            self._due = math.inf
            return False
        self._due = clock + max(INTERVAL_S, (time.monotonic() - clock) / MOST_COST)
        before, self._last = self._last, now
        if before is None or now.at <= before.at:
            return False
        others = others_cpus(before, now)
        self._allowed.append((now.at, threads_beside(others, most=self._most, cpus=self._cpus)))
        while self._allowed[0][0] <= now.at - CALM_S:
            self._allowed.popleft()
        threads, self.threads = self.threads, min(count for _, count in self._allowed)
        return threads != self.threads
