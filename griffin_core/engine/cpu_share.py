"""How many threads a step runs on: as many as there are CPUs that no other program uses.

A team of threads is as fast as its slowest thread. If a busy program shares a CPU with one of them,
all of them wait for that thread; with one thread less that CPU is left to the program, and none of
them waits (docs/LOG.md). So the engine measures five times a second how much of its CPUs other
programs use.
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
"""Seconds between two measurements. The kernel counts CPU time in hundredths of a second."""

TOLERATED_CPUS = 0.4
"""Share of a CPU that other programs may use before the CPU is left to them."""

CALM_S = 1.0
"""Seconds for which all measurements must allow more threads before there are more."""

MOST_COST = 0.005
"""Largest share of the time that is spent on measuring: on a machine with hundreds of CPUs, reading
their times is slow."""


def allowed_cpus() -> frozenset[int]:
    """CPUs that the scheduler may put this thread on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def available_cpus(cgroup: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Number of CPUs that the scheduler may put this process on, limited to what the quotas of its
    control groups allow, rounded up. At least 1."""
    return max(1, math.ceil(min(len(allowed_cpus()), quota_cpus(cgroup, membership))))


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """CPU time used so far.

    Args:
        at: when it was read, in seconds on ``time.monotonic``.
        busy_s: CPU seconds that this process's CPUs have worked, for any program.
        own_s: CPU seconds of this process, of all its threads together.
    """

    at: float
    busy_s: float
    own_s: float


def busy_seconds(stat: str, cpus: frozenset[int], ticks_per_s: int) -> float:
    """CPU seconds that some CPUs have worked since the machine's start.

    Args:
        stat: the text of /proc/stat.

    Raises:
        ValueError, IndexError: the text is in another format.
    """
    ticks = 0
    for line in stat.splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, irq, softirq = map(int, counts[:7])
            ticks += user + nice + system + irq + softirq
    return ticks / ticks_per_s


def read_cpu_times() -> CpuTimes | None:
    """Reads the CPU times; None where the system does not offer them (it is not Linux)."""
    try:
        text = STAT.read_text(encoding="ascii")
        busy_s = busy_seconds(text, allowed_cpus(), os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return None
    return CpuTimes(at=time.monotonic(), busy_s=busy_s, own_s=time.process_time())


def others_cpus(before: CpuTimes, after: CpuTimes) -> float:
    """CPUs that other programs kept busy between two measurements."""
    busy_s, own_s = after.busy_s - before.busy_s, after.own_s - before.own_s
    return max(0.0, busy_s - own_s) / (after.at - before.at)


def threads_beside(others: float, *, max_threads: int, cpus: int) -> int:
    """Threads to run while other programs use ``others`` CPUs.

    Args:
        max_threads: threads on an idle machine, by affinity and quota.
        cpus: CPUs that threads may be put on.

    Returns:
        One for each CPU that is left, but at least half of ``max_threads``: programs that want all
        CPUs do not get more.
    """
    free = math.floor(cpus - others + TOLERATED_CPUS)
    return max(1, max_threads // 2, min(max_threads, free))


class CpuShare:
    """The number of threads to run on, as the load of the machine changes. Owned by one thread.

    It is the least number that the measurements of the last second allow: it falls at once and
    rises slowly, since a thread too many costs more than a thread too few.

    Args:
        max_threads: threads on an idle machine; None for ``available_cpus``.
        cpus: CPUs that threads may be put on; None for ``allowed_cpus``.
        read: reads the CPU times.
    """

    def __init__(
        self,
        *,
        max_threads: int | None = None,
        cpus: int | None = None,
        read: Callable[[], CpuTimes | None] = read_cpu_times,
    ) -> None:
        self._max_threads = max_threads or available_cpus()
        self._cpus = cpus or len(allowed_cpus())
        self._read = read
        self._last: CpuTimes | None = None
        self._due = 0.0
        self._allowed: deque[tuple[float, int]] = deque()  # when, and how many
        self.threads = self._max_threads
        """Number of threads to run on now."""

    def forget(self) -> None:
        """Forgets all measurements, after the process was idle: what other programs used meanwhile
        cost it nothing and says little about now. ``threads`` may change with the second
        measurement from now."""
        self._last = None
        self._allowed.clear()
        self._due = min(self._due, time.monotonic()) if self._due < math.inf else self._due

    def follow(self) -> bool:
        """Measures, if that is due; for calls between steps. Returns whether ``threads`` has
        changed."""
        clock = time.monotonic()
        if self._max_threads == 1 or clock < self._due:
            return False
        now = self._read()
        if now is None:  # the system will not offer them later either
            self._due = math.inf
            return False
        self._due = clock + max(INTERVAL_S, (time.monotonic() - clock) / MOST_COST)
        before, self._last = self._last, now
        if before is None or now.at <= before.at:
            return False
        others = others_cpus(before, now)
        self._allowed.append(
            (now.at, threads_beside(others, max_threads=self._max_threads, cpus=self._cpus))
        )
        while self._allowed[0][0] <= now.at - CALM_S:
            self._allowed.popleft()
        threads, self.threads = self.threads, min(count for _, count in self._allowed)
        return threads != self.threads
