"""How many threads there are to use: by affinity, by quotas, and beside busy neighbours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from griffin_core.engine import cpu_share
from griffin_core.engine.cgroup import memory_left, quota_cpus
from griffin_core.engine.cpu_share import (
    CALM_S,
    INTERVAL_S,
    CpuShare,
    CpuTimes,
    available_cpus,
    busy_seconds,
    others_cpus,
    threads_beside,
)
from griffin_core.engine.ports import Observer
from griffin_core.model.load import Model
from tests.unit.core.engines import complete, engine
from tests.unit.core.test_scheduler import task

STAT = """\
cpu  700 10 250 10000 270 3 38 11 20 5
cpu0 400 10 150 5000 170 2 20 9 15 5
cpu1 200 0 60 2000 60 1 8 1 5 0
cpu2 100 0 40 3000 40 0 10 1 0 0
intr 33476412 0 9
ctxt 123
"""
"""Of three CPUs, in hundredths of a second: user, nice, system, idle, iowait, irq, softirq, steal,
guest, guest_nice."""


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


# -- what control groups allow ---------------------------------------------------------------------


@pytest.mark.usefixtures("sixteen")
@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 16),
        ({"cpu.max": "nonsense"}, 16),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
    ],
)
def test_no_more_cpus_are_used_than_affinity_and_the_own_group_allow(
    files: dict[str, str], cpus: int, tmp_path: Path
) -> None:
    write(tmp_path, files)
    assert available_cpus(tmp_path, tmp_path / "no membership") == cpus


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "200000 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "other/cpu.max": "100000 100000"}, 2),
        # A container whose path is the host's: what is mounted at the root is its own group.
        ("0::/docker/f00\n", {"cpu.max": "250000 100000"}, 2.5),
        (
            "4:memory:/m\n3:cpu,cpuacct:/a\n0::/\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "50000"},
            1,
        ),
        (
            "1:cpu:/a/b\n",
            {"cpu/a/cpu.cfs_quota_us": "70000", "cpu/a/cpu.cfs_period_us": "100000"},
            0.7,
        ),
        ("1:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("no line of that form", {}, None),
    ],
)
def test_the_tightest_quota_of_all_groups_above_counts(
    membership: str, files: dict[str, str], cpus: float | None, tmp_path: Path
) -> None:
    write(tmp_path, {"membership": membership, **{f"groups/{n}": t for n, t in files.items()}})
    quota = quota_cpus(tmp_path / "groups", tmp_path / "membership")
    assert quota == (float("inf") if cpus is None else cpus)


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        ("0::/a\n", {"a/memory.max": "max", "a/memory.current": "100"}, None),
        ("0::/a\n", {"a/memory.max": "1000", "a/memory.current": "400"}, 600),
        (
            "0::/a/b\n",
            {
                "a/memory.max": "1000",
                "a/memory.current": "900",
                "a/memory.stat": "anon 700\nfile 200\ninactive_file 150\n",
                "a/b/memory.max": "800",
                "a/b/memory.current": "100",
            },
            250,
        ),
        ("0::/a\n", {"a/memory.max": "1000", "a/memory.current": "1300"}, 0),
        (
            "4:memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": "1000",
                "memory/a/memory.usage_in_bytes": "700",
                "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
            },
            350,
        ),
    ],
)
def test_what_memory_limits_leave_counts_file_pages_as_free(
    membership: str, files: dict[str, str], left: int | None, tmp_path: Path
) -> None:
    write(tmp_path, {"membership": membership, **{f"groups/{n}": t for n, t in files.items()}})
    found = memory_left(tmp_path / "groups", tmp_path / "membership")
    assert found == (float("inf") if left is None else left)


# -- what others take ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "seconds"),
    [({0}, 5.82), ({1, 2}, 4.19), ({0, 1, 2}, 10.01), ({7}, 0.0)],
)
def test_only_this_processes_cpus_are_counted_and_neither_idle_nor_stolen_time(
    cpus: set[int], seconds: float
) -> None:
    assert busy_seconds(STAT, frozenset(cpus), 100) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["cpu0 1 2\n", "cpu0 a b c d e f g h\n"])
def test_a_system_that_does_not_tell_is_not_asked_again(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path / "stat", tmp_path / "none"):
        (tmp_path / "stat").write_text(text, encoding="ascii")
        monkeypatch.setattr(cpu_share, "STAT", path)
        monkeypatch.setattr(cpu_share, "allowed_cpus", lambda: frozenset({0}))
        assert cpu_share.read_cpu_times() is None
    asked = []

    def nothing() -> None:
        asked.append(1)

    share = CpuShare(max_threads=4, cpus=4, read=nothing)
    assert not any(share.follow() for _ in range(3))
    assert (share.threads, len(asked)) == (4, 1)


def test_this_process_is_not_another() -> None:
    """The clocks of this machine: an idle process sees no less than nothing of others."""
    before = cpu_share.read_cpu_times()
    if before is None:
        pytest.skip("not Linux")
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    after = cpu_share.read_cpu_times()
    assert after is not None
    assert after.own_s - before.own_s >= 0.05
    assert 0 <= others_cpus(before, after) <= len(cpu_share.allowed_cpus()) * 2


@pytest.mark.parametrize(
    ("others", "most", "cpus", "threads"),
    [
        # Two CPUs: no other program, a client, one busy loop beside two threads and beside one,
        # two loops.
        (0.0, 2, 2, 2),
        (0.25, 2, 2, 2),
        (0.67, 2, 2, 1),
        (1.0, 2, 2, 1),
        (1.34, 2, 2, 1),
        (1.9, 2, 2, 1),
        # Sixteen: a busy loop costs one thread, a program that wants all of them no more than half.
        (0.3, 16, 16, 16),
        (1.0, 16, 16, 15),
        (5.2, 16, 16, 11),
        (15.5, 16, 16, 8),
        # A quota of four CPUs on a machine of sixteen: there is room beside most neighbours.
        (9.0, 4, 16, 4),
        (13.0, 4, 16, 3),
        (16.0, 4, 16, 2),
        (1.0, 1, 1, 1),
    ],
)
def test_a_thread_for_each_cpu_that_others_leave(
    others: float, most: int, cpus: int, threads: int
) -> None:
    assert threads_beside(others, max_threads=most, cpus=cpus) == threads


STEP_S = 0.25
"""Between two looks; sums of it are exact."""
assert STEP_S >= INTERVAL_S


class Clock:
    """A machine of two CPUs on which others take what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = self.busy_s = 0.0
        monkeypatch.setattr(cpu_share.time, "monotonic", lambda: self.at)

    def look(self) -> CpuTimes:
        return CpuTimes(at=self.at, busy_s=self.busy_s, own_s=0.0)

    def threads(self, share: CpuShare, others: Iterable[float]) -> list[int]:
        """The number of threads after each look."""
        counts = []
        for taken in others:
            self.at += STEP_S
            self.busy_s += taken * STEP_S
            share.follow()
            counts.append(share.threads)
        return counts


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_threads_fall_at_once_and_rise_after_a_second_of_calm(clock: Clock) -> None:
    share = CpuShare(max_threads=2, cpus=2, read=clock.look)
    share.follow()
    looks = round(CALM_S / STEP_S)
    assert clock.threads(share, [0.0, 0.1]) == [2, 2]
    assert clock.threads(share, [1.0, 1.3]) == [1, 1]
    assert clock.threads(share, [0.0] * looks) == [1] * (looks - 1) + [2]
    assert clock.threads(share, [0.9] + [0.0] * looks) == [1] * looks + [2]


def test_one_look_over_a_long_step_is_enough_to_rise(clock: Clock) -> None:
    share = CpuShare(max_threads=2, cpus=2, read=clock.look)
    share.follow()
    assert clock.threads(share, [1.0]) == [1]
    clock.at += 2 * CALM_S
    assert clock.threads(share, [0.0]) == [2]


def test_what_others_did_while_the_process_was_idle_is_not_held_against_it(clock: Clock) -> None:
    share = CpuShare(max_threads=2, cpus=2, read=clock.look)
    share.follow()
    clock.at += 60
    clock.busy_s += 120  # both CPUs, all the time
    share.forget()
    share.follow()
    assert share.threads == 2
    assert clock.threads(share, [1.0]) == [1]  # but what they do now is
    share.forget()
    assert clock.threads(share, [0.0, 0.0]) == [1, 2]


def test_between_two_looks_nothing_is_read(clock: Clock) -> None:
    asked = []

    def look() -> CpuTimes:
        asked.append(clock.at)
        return clock.look()

    share = CpuShare(max_threads=2, cpus=2, read=look)
    for _ in range(10):
        clock.at += INTERVAL_S / 5
        share.follow()
    assert len(asked) == 2


def test_one_thread_has_nothing_to_follow(clock: Clock) -> None:
    share = CpuShare(max_threads=1, cpus=8, read=lambda: pytest.fail("looked"))
    assert clock.threads(share, [3.0, 0.0]) == [1, 1]


# -- an engine ------------------------------------------------------------------------------------


class CountsThreads(Observer):
    """Notes on how many threads each step ran."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def stepped(self, seconds: float, sessions: int) -> None:
        self.threads.append(torch.get_num_threads())


@pytest.fixture
def torchs_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def busy_after(calm: int) -> Callable[[], CpuTimes]:
    """Clocks of two CPUs that others leave alone for so many looks and keep busy afterwards."""
    looks = iter(range(1000))

    def look() -> CpuTimes:
        number = next(looks)
        return CpuTimes(at=float(number), busy_s=2.0 * max(0, number - calm), own_s=0.0)

    return look


@pytest.mark.usefixtures("torchs_threads")
def test_steps_run_on_fewer_threads_once_others_are_busy(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_share, "INTERVAL_S", 0.0)
    monkeypatch.setattr(cpu_share, "MOST_COST", float("inf"))
    counts, share = CountsThreads(), CpuShare(max_threads=2, cpus=2, read=busy_after(12))
    with engine(tiny("llama"), prefill_source=None, threads=share, observer=counts) as running:
        assert running.threads == 2
        complete(running, task(60))
        assert running.threads == 1
    assert counts.threads[0] == 2 and counts.threads[-1] == 1
    assert counts.threads == sorted(counts.threads, reverse=True)


@pytest.mark.usefixtures("torchs_threads")
def test_a_number_of_threads_that_is_set_stays(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_share, "read_cpu_times", lambda: pytest.fail("looked"))
    counts = CountsThreads()
    with engine(tiny("llama"), prefill_source=None, threads=2, observer=counts) as running:
        complete(running, task(60))
        assert running.threads == 2
    assert set(counts.threads) == {2}
