"""How many CPUs this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = CGROUP) -> int:
    """CPUs the scheduler may put this process on, and no more than its control group's quota pays
    for, rounded up. At least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(allowed or 1, _quota(cgroup)))


def _quota(cgroup: Path) -> int:
    """Of cgroup v2, else v1; many if there is none."""
    for quota_file, period_file in (
        ("cpu.max", None),
        ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
    ):
        try:
            words = (cgroup / quota_file).read_text().split()
            words += (cgroup / period_file).read_text().split() if period_file else []
        except OSError:
            continue
        if len(words) == 2 and words[0].isdecimal() and int(words[1]) > 0:
            return math.ceil(int(words[0]) / int(words[1]))
    return os.cpu_count() or 1
