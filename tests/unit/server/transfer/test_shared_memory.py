"""Segments: proved before use, reused, and never left behind."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from griffin_server.transfer import shared_memory
from griffin_server.transfer.shared_memory import (
    DATA_START,
    Segment,
    SegmentPool,
    attach_segment,
    create_segment,
    remove_stale_segments,
)

SIZE = 1 << 16


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = create_segment(SIZE)
    assert made is not None
    yield made
    made.unlink()


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory for the test alone: servers of other tests sweep the real one when they start."""
    monkeypatch.setattr(shared_memory, "DIRECTORY", tmp_path)


def files() -> set[str]:
    return {path.name for path in shared_memory.DIRECTORY.glob(f"griffin-{os.getpid()}-*")}


def test_both_ends_see_the_same_bytes(segment: Segment) -> None:
    nonce = segment.write_nonce()
    other = attach_segment(segment.name, SIZE, nonce)
    assert other is not None
    tensor = torch.arange(100, dtype=torch.float32)
    written = other.write(DATA_START + 40, tensor)
    assert segment.read(DATA_START + 40, tensor.nbytes) == bytes(written)
    assert torch.equal(
        torch.frombuffer(segment.read(DATA_START + 40, 400), dtype=torch.float32), tensor
    )


def test_an_offer_that_cannot_be_proved_is_declined(segment: Segment) -> None:
    nonce = segment.write_nonce()
    assert attach_segment(segment.name, SIZE, b"x" * 16) is None
    assert attach_segment(segment.name, 4 * SIZE, nonce) is None
    assert attach_segment(f"griffin-1-{'0' * 32}", SIZE, nonce) is None


@pytest.mark.parametrize("name", ["../etc/passwd", "passwd", "", "griffin-1-xyz", "/dev/zero"])
def test_names_that_are_not_segments_are_never_opened(name: str) -> None:
    assert attach_segment(name, SIZE, b"0" * 16) is None


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "secret"
    target.write_bytes(b"0" * SIZE)
    name = f"griffin-{os.getpid()}-{'0' * 32}"
    (shared_memory.DIRECTORY / name).symlink_to(target)
    try:
        assert attach_segment(name, SIZE, b"0" * 16) is None
    finally:
        (shared_memory.DIRECTORY / name).unlink()


@pytest.mark.parametrize("offset", [0, DATA_START - 1, SIZE - 3, SIZE, -8])
def test_nothing_outside_the_segment_is_touched(segment: Segment, offset: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        segment.write(offset, torch.zeros(1))
    with pytest.raises(ValueError, match="outside"):
        segment.read(offset, 4)


def test_no_room_is_no_segment_and_leaves_no_file() -> None:
    before = files()
    assert create_segment(1 << 60) is None
    assert files() == before


def test_no_such_file_system_is_no_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "DIRECTORY", Path("/nonexistent"))
    assert create_segment(SIZE) is None
    remove_stale_segments()


def test_the_pool_reuses_what_is_large_enough_and_keeps_few() -> None:
    before = files()
    pool = SegmentPool()
    small, middle, large = (pool.acquire(size) for size in (1000, 5000, 20000))
    assert small and middle and large
    for segment in (small, middle, large):
        pool.release(segment)
    assert files() - before == {middle.name, large.name}  # the smallest went
    assert pool.acquire(4000) is middle
    assert pool.acquire(4000) is large
    pool.release(middle)
    pool.release(large)
    pool.close()
    assert files() == before


def test_segments_of_dead_processes_are_removed_and_those_of_live_ones_stay() -> None:
    code = (
        "import sys; from pathlib import Path; from griffin_server.transfer import shared_memory; "
        "shared_memory.DIRECTORY = Path(sys.argv[1]); print(shared_memory.create_segment(99).name)"
    )
    command = [sys.executable, "-c", code, str(shared_memory.DIRECTORY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    stale = shared_memory.DIRECTORY / done.stdout.strip()
    live = create_segment(SIZE)
    assert live is not None and stale.exists()
    remove_stale_segments()
    assert not stale.exists()
    assert (shared_memory.DIRECTORY / live.name).exists()
    live.unlink()


def test_whether_its_owner_lives_is_no_matter_of_process_ids() -> None:
    # In containers that share /dev/shm, the process before this one had its id, and those beside it
    # have ids of which there is nothing in /proc.
    stale = shared_memory.DIRECTORY / f"griffin-{os.getpid()}-{'2' * 32}"
    stale.touch()
    live = create_segment(SIZE)
    assert live is not None
    elsewhere = shared_memory.DIRECTORY / f"griffin-999999999-{'3' * 32}"
    (shared_memory.DIRECTORY / live.name).rename(elsewhere)
    remove_stale_segments()
    assert not stale.exists()
    assert elsewhere.exists()
    elsewhere.unlink()


def test_a_file_that_was_taken_for_a_stale_one_is_no_segment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        remove_stale_segments()  # of a server that starts just now
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert create_segment(SIZE) is None
    segment = create_segment(SIZE)
    assert segment is not None
    segment.unlink()


def test_a_segment_of_another_user_is_declined(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    nonce = segment.write_nonce()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert attach_segment(segment.name, SIZE, nonce) is None


def test_a_sparse_offer_is_filled_before_it_is_written() -> None:
    name = f"griffin-{os.getpid()}-{'1' * 32}"
    path = shared_memory.DIRECTORY / name
    with path.open("wb") as file:
        file.write(b"n" * 16)
        file.truncate(SIZE)
    assert attach_segment(name, SIZE, b"n" * 16) is not None
    assert path.stat().st_blocks * 512 >= SIZE
    path.unlink()


def test_a_segment_that_comes_back_to_a_closed_pool_is_removed() -> None:
    before = files()
    pool = SegmentPool()
    segment = pool.acquire(1000)
    assert segment is not None
    pool.close()
    pool.release(segment)
    assert files() == before


def test_a_stale_segment_that_cannot_be_removed_stops_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    path = shared_memory.DIRECTORY / f"griffin-999999999-{'0' * 32}"
    path.touch()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        remove_stale_segments()
    remove_stale_segments()
    assert not path.exists()
