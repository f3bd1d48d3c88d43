"""What the control groups of this process allow it: CPU quota and memory, in cgroup v1 and v2.

A process is in one group of each hierarchy, and every group above that one limits it too. In a
container the path that the kernel names may be a path of the host, which cannot be read there. Then
the container's own group is mounted at the root.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def quota_cpus(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """Number of CPUs that the tightest quota allows; infinite if there is no quota."""
    quotas = [math.inf]
    for group in _groups("cpu", root, membership):
        fields = _read(group / "cpu.max").split() or [
            *_read(group / "cpu.cfs_quota_us").split(),
            *_read(group / "cpu.cfs_period_us").split(),
        ]
        match fields:
            case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period):
                quotas.append(int(quota) / int(period))
    return min(quotas)


def memory_left(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """Bytes until the tightest memory limit, with cached file pages that the kernel would give up
    counted as free; infinite if there is no limit."""
    left = [math.inf]
    for group in _groups("memory", root, membership):
        for limit_file, usage_file, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _read(group / limit_file).strip(), _read(group / usage_file).strip()
            if limit.isdecimal() and usage.isdecimal():
                pairs = (line.split() for line in _read(group / "memory.stat").splitlines())
                statistics = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
                left.append(max(0, int(limit) - int(usage) + statistics.get(cached, 0)))
    return min(left)


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Directories of this process's group of a controller and of the groups above it. They need not
    exist: a missing file reads as empty."""
    for line in _read(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # v2
            mounts = [root]
        elif controller in controllers.split(","):
            mounts = [root / controllers, root / controller]
        else:
            continue
        relative = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            for group in (relative, *relative.parents):
                yield mount / group
    # The root itself, for a process without a membership that can be read.
    yield from (root, root / controller)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
