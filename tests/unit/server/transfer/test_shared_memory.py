"""Segments: given once, proved before use, never shrunk, reused, and never left behind."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from griffin.v1 import prefill_pb2 as pb
from griffin_server.security.errors import BadSecurityFile
from griffin_server.settings import Settings
from griffin_server.transfer import descriptors, shared_memory
from griffin_server.transfer.descriptors import (
    DescriptorSocket,
    fetch,
    handoff_directory,
    open_directory,
)
from griffin_server.transfer.shared_memory import (
    DATA_START,
    Segment,
    SegmentPool,
    attach_segment,
    create_segment,
)
from tests.servers import segments

SIZE = 1 << 16

NONCE = b"n" * 16


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = create_segment(SIZE)
    assert made is not None
    yield made
    made.close()


def offer_of(
    giver: DescriptorSocket, descriptor: int, nonce: bytes, size_bytes: int = SIZE
) -> pb.SharedMemoryOffer:
    giver.offer(nonce, descriptor)
    return pb.SharedMemoryOffer(socket=giver.name, size_bytes=size_bytes, nonce=nonce)


def test_both_ends_see_the_same_bytes(
    segment: Segment, giver: DescriptorSocket, directory: Path
) -> None:
    other = attach_segment(directory, offer_of(giver, segment.descriptor, segment.write_nonce()))
    assert other is not None
    tensor = torch.arange(100, dtype=torch.float32)
    written = other.write(DATA_START + 40, tensor)
    assert segment.read(DATA_START + 40, tensor.nbytes) == bytes(written)
    assert torch.equal(
        torch.frombuffer(segment.read(DATA_START + 40, 400), dtype=torch.float32), tensor
    )


def test_a_descriptor_is_given_once_and_not_after_its_offer_ends(
    segment: Segment, giver: DescriptorSocket, directory: Path
) -> None:
    offer = offer_of(giver, segment.descriptor, segment.write_nonce())
    assert attach_segment(directory, offer) is not None
    assert attach_segment(directory, offer) is None
    again = offer_of(giver, segment.descriptor, segment.write_nonce())
    giver.withdraw(again.nonce)
    assert attach_segment(directory, again) is None


def test_an_offer_that_cannot_be_proved_is_declined(
    segment: Segment, giver: DescriptorSocket, directory: Path
) -> None:
    segment.write_nonce()
    assert attach_segment(directory, offer_of(giver, segment.descriptor, NONCE)) is None
    nonce = segment.write_nonce()
    assert attach_segment(directory, offer_of(giver, segment.descriptor, nonce, 4 * SIZE)) is None
    offer = offer_of(giver, segment.descriptor, segment.write_nonce())
    for name in (f"handoff-{'0' * 16}", "../handoff", "", "handoff-xyz", "/dev/log"):
        offer.socket = name
        assert attach_segment(directory, offer) is None


@pytest.mark.parametrize("nonce", [b"", b"x", b"x" * 15, b"x" * 17, b"x" * 5000])
def test_a_secret_that_is_none_gets_nothing(
    nonce: bytes, segment: Segment, giver: DescriptorSocket, directory: Path
) -> None:
    giver.offer(NONCE, segment.descriptor)
    assert fetch(directory, giver.name, nonce) is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.settimeout(10)
        caller.connect(os.fspath(directory / giver.name))
        caller.send(nonce)
        _, given, _, _ = socket.recv_fds(caller, 1, 1)
    assert given == []
    next_one = fetch(directory, giver.name, NONCE)
    assert next_one is not None
    os.close(next_one)


def test_one_that_connects_and_says_nothing_holds_up_nobody_for_long(
    segment: Segment, giver: DescriptorSocket, directory: Path
) -> None:
    giver.offer(NONCE, segment.descriptor)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(os.fspath(directory / giver.name))
        given = fetch(directory, giver.name, NONCE)
    assert given is not None
    os.close(given)


def unsealed(size: int) -> int:
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.write(descriptor, NONCE.ljust(size, b"\0"))
    return descriptor


def a_file(size: int) -> int:
    descriptor = os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE, 0o600)
    os.write(descriptor, NONCE.ljust(size, b"\0"))
    return descriptor


def a_pipe(size: int) -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


@pytest.mark.parametrize("make", [unsealed, a_file, a_pipe])
def test_memory_that_could_be_taken_away_is_not_mapped(
    make: object, giver: DescriptorSocket, directory: Path
) -> None:
    descriptor = make(SIZE)  # type: ignore[operator]
    assert attach_segment(directory, offer_of(giver, descriptor, NONCE)) is None
    os.close(descriptor)


def test_a_segment_cannot_be_shrunk_by_whoever_has_it(
    segment: Segment, giver: DescriptorSocket, directory: Path
) -> None:
    giver.offer(NONCE, segment.descriptor)
    given = fetch(directory, giver.name, NONCE)
    assert given is not None
    for size in (0, SIZE // 2, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(given, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(given, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(given)
    segment.write(SIZE - 4, torch.zeros(1))


@pytest.mark.parametrize("offset", [0, DATA_START - 1, SIZE - 3, SIZE, -8])
def test_nothing_outside_the_segment_is_touched(segment: Segment, offset: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        segment.write(offset, torch.zeros(1))
    with pytest.raises(ValueError, match="outside"):
        segment.read(offset, 4)


def test_too_little_memory_is_no_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = segments()
    assert create_segment(1 << 60) is None
    monkeypatch.setattr(shared_memory, "available_bytes", lambda: SIZE)
    assert create_segment(SIZE) is None
    assert segments() == before


def test_a_system_without_such_memory_has_no_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert create_segment(SIZE) is None


def test_the_pool_reuses_what_is_large_enough_and_keeps_few() -> None:
    before = segments()
    pool = SegmentPool()
    small, middle, large = (pool.acquire(size) for size in (1000, 5000, 20000))
    assert small and middle and large
    assert segments() == before + 3
    for segment in (small, middle, large):
        pool.release(segment)
    assert segments() == before + 2  # the smallest went
    assert pool.acquire(4000) is middle
    assert pool.acquire(4000) is large
    pool.release(middle)
    pool.release(large)
    pool.close()
    assert segments() == before


def test_a_segment_that_comes_back_to_a_closed_pool_is_let_go() -> None:
    before = segments()
    pool = SegmentPool()
    segment = pool.acquire(1000)
    assert segment is not None
    pool.close()
    pool.release(segment)
    assert segments() == before


def test_a_segment_that_nobody_closes_is_let_go_with_its_last_reference() -> None:
    before = segments()
    create_segment(SIZE)
    assert segments() == before


# -- the directory of the sockets ------------------------------------------------------------------


def test_a_killed_server_leaves_a_socket_that_the_next_one_removes(directory: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; "
        "from griffin_server.transfer.descriptors import DescriptorSocket; "
        "print(DescriptorSocket(Path(sys.argv[1])).name, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        stale = process.stdout.readline().strip()
        alive = DescriptorSocket(directory)
        assert {path.name for path in directory.iterdir()} == {stale, alive.name}
        process.send_signal(signal.SIGKILL)
    assert fetch(directory, stale, NONCE) is None
    after = DescriptorSocket(directory)
    assert {path.name for path in directory.iterdir()} == {alive.name, after.name}
    after.close()
    alive.close()
    assert list(directory.iterdir()) == []


def test_the_directory_is_made_for_one_user(directory: Path) -> None:
    open_directory(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    for mode in (0o777, 0o750, 0o701):
        directory.chmod(mode)
        with pytest.raises(OSError, match="0700"):
            open_directory(directory)


def test_a_directory_of_another_user_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_directory(directory)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(OSError, match="of this user"):
        open_directory(directory)


def test_a_link_and_a_file_are_no_directory(directory: Path, tmp_path: Path) -> None:
    open_directory(directory)
    (tmp_path / "link").symlink_to(directory)
    (tmp_path / "file").touch(mode=0o600)
    for name in ("link", "file"):
        with pytest.raises(OSError, match="directory"):
            open_directory(tmp_path / name)


def test_a_directory_that_the_settings_name_must_be_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = tmp_path / "loose"
    loose.mkdir(mode=0o755)
    for bad in (loose, tmp_path / "missing" / "below", tmp_path / ("x" * 120)):
        with pytest.raises(BadSecurityFile, match="handoff_dir"):
            handoff_directory(Settings(handoff_dir=bad))
        # The default may be unusable, since nobody chose it; then KV goes in messages.
        monkeypatch.setattr(descriptors, "default_directory", lambda bad=bad: bad)
        assert handoff_directory(Settings()) is None
    assert handoff_directory(Settings(handoff_dir=loose, handoff="messages")) is None
    usable = tmp_path / "usable"
    assert handoff_directory(Settings(handoff_dir=usable)) == usable and usable.is_dir()


def test_many_ask_at_once(segment: Segment, giver: DescriptorSocket, directory: Path) -> None:
    nonces = [bytes([number]) * 16 for number in range(40)]
    for nonce in nonces:
        giver.offer(nonce, segment.descriptor)
    given: list[int | None] = []

    def ask(nonce: bytes) -> None:
        given.append(fetch(directory, giver.name, nonce))

    threads = [threading.Thread(target=ask, args=(nonce,)) for nonce in nonces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) == 40
    for descriptor in given:
        assert descriptor is not None
        os.close(descriptor)
