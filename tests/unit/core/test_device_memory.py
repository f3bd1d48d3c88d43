"""What sessions may hold, from what a device has left."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from griffin_core.engine import device_memory, memory
from griffin_core.engine.device_memory import (
    ASSUMED_BYTES,
    DeviceShare,
    Room,
    available_bytes,
    check_room,
    format_bytes,
    fraction_of,
)
from griffin_core.engine.engine import Engine
from griffin_core.engine.events import Finished
from griffin_core.engine.limits import Limits
from griffin_core.errors import DeviceMemoryExhausted
from griffin_core.kv.pool import KvPool, kv_bytes
from griffin_core.model.load import Model, decoder_on_device
from tests.unit.core.engines import complete, engine
from tests.unit.core.test_scheduler import task

GIB = 1 << 30


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes this process can take."""

    def set_to(size: int) -> None:
        monkeypatch.setattr(device_memory, "available_bytes", lambda: size)

    return set_to


# -- a CPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "groups", "expected"),
    [
        ("MemTotal:  900 kB\nMemFree: 1 kB\nMemAvailable:   600 kB\n", float("inf"), 600 << 10),
        ("MemAvailable:   600 kB\n", 1000.0, 1000),
        ("MemAvailable:   many kB\n", float("inf"), ASSUMED_BYTES),
        (None, float("inf"), ASSUMED_BYTES),
        (None, 5000.0, 5000),
    ],
)
def test_what_the_machine_has_or_the_groups_leave_whichever_is_less(
    text: str | None, groups: float, expected: int, tmp_path: Path
) -> None:
    path = tmp_path / "meminfo"
    if text is not None:
        path.write_text(text, encoding="ascii")
    assert available_bytes(path, lambda: groups) == expected


@pytest.mark.parametrize(
    ("limits", "session", "idle"),
    [
        (Limits(), 4 * GIB, GIB),
        (Limits(memory_fraction=0.25), 2 * GIB, GIB // 2),
        (Limits(memory_fraction=1.0, idle_bytes=5), 8 * GIB, 5),
        (Limits(session_bytes=40 * GIB), 40 * GIB, 10 * GIB),
        (Limits(session_bytes=3 * GIB, memory_fraction=0.1, idle_bytes=9 * GIB), 3 * GIB, 3 * GIB),
    ],
)
def test_half_of_what_is_available_or_what_the_limits_say(
    limits: Limits, session: int, idle: int, model: Model, available: Callable[[int], None]
) -> None:
    available(8 * GIB)
    with engine(model, limits=limits) as running:
        running.ready.result(30)
        assert running.session_bytes == session
        assert running.snapshot().result(10).nbytes.idle_limit == idle
        assert running.usage().result(10).limit_bytes == session


def test_a_request_that_comes_before_the_memory_is_known_waits_for_it(model: Model) -> None:
    running = Engine(model)
    assert running.session_bytes == 0
    running.start()
    try:
        assert isinstance(complete(running, task())[1], Finished)
    finally:
        running.stop()


def test_the_start_says_how_many_tokens_there_is_room_for(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    one = kv_bytes(model.decoder.spec, torch.float32, 1)
    context = model.decoder.spec.context_length
    for tokens, warned in ((1234, True), (context, False), (context - 1, True)):
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, "griffin_core.engine.memory"),
            engine(model, limits=Limits(session_bytes=tokens * one)) as running,
        ):
            running.ready.result(30)
        first, *more = [record.getMessage() for record in caplog.records]
        assert first.startswith("session memory ") and f": {tokens:,} tokens of KV" in first
        assert bool(more) == (tokens < context), (tokens, warned)
        if more:
            assert f"full context of {context:,}" in more[0]


def test_an_engine_for_the_prompts_of_others_alone_holds_no_sessions(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "griffin_core.engine.memory"),
        engine(model, limits=Limits(session_bytes=0)) as running,
    ):
        running.ready.result(30)
        assert running.session_bytes == 0
    assert not caplog.records


def test_an_engine_without_room_for_a_chunk_does_not_start(
    model: Model, available: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    available(1000)
    running = Engine(model)
    running.start()
    with pytest.raises(DeviceMemoryExhausted, match=r"0\.5 of what the machine has free"):
        running.ready.result(30)
    running.stop()
    assert not caplog.records  # a sentence, and no traceback


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.01, float("nan")])
def test_a_fraction_is_more_than_nothing_and_at_most_all(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"memory_fraction: got .*; allowed: \(0, 1\]"):
        Limits(memory_fraction=fraction)


# -- a GPU, with fake readings ---------------------------------------------------------------------


def test_each_kind_of_device_has_a_fraction_of_its_own() -> None:
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert (fraction_of(gpu, None), fraction_of(cpu, None)) == (0.9, 0.5)
    assert fraction_of(gpu, 0.3) == fraction_of(cpu, 0.3) == 0.3


def test_a_fraction_is_of_what_is_free_beside_what_a_prompt_works_in() -> None:
    room = Room(free=61 * GIB, workspace=GIB)
    assert check_room(room, 0.9, None, GIB, device="cuda:0") == 54 * GIB
    assert check_room(room, 0.9, 60 * GIB, GIB, device="cuda:0") == 60 * GIB


def test_the_second_server_takes_its_fraction_of_what_is_left() -> None:
    free, taken = 60 * GIB, []
    for _ in range(3):
        taken.append(check_room(Room(free=free, workspace=0), 0.5, None, 1, device="cuda:0"))
        free -= taken[-1]
    assert taken == [30 * GIB, 15 * GIB, 7.5 * GIB]


@pytest.mark.parametrize(
    ("room", "wanted", "words"),
    [
        (Room(free=5 * GIB, workspace=GIB), 6 * GIB, ["got 6;", "cuda:1 has 4.0 GiB free"]),
        (Room(free=GIB // 2, workspace=GIB), 1, ["cuda:1 has 0 bytes free"]),
        (Room(free=2 * GIB, workspace=GIB), None, ["0.9 of what cuda:1", "921.6 MiB", "2.0 GiB"]),
        (Room(free=0, workspace=GIB), None, ["0 bytes", "--memory-fraction"]),
    ],
)
def test_too_little_is_refused_in_one_line_with_what_is_free(
    room: Room, wanted: int | None, words: list[str]
) -> None:
    with pytest.raises(DeviceMemoryExhausted) as caught:
        check_room(room, 0.9, wanted, 2 * GIB, device="cuda:1")
    said = str(caught.value)
    assert "\n" not in said
    for word in words:
        assert word in said


class Gpu:
    """A GPU as torch shows it: bytes that are free, and bytes that this process's allocator holds
    without a tensor in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.cached = free, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self.free, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty_cache)
        monkeypatch.setattr(device_memory, "cached_bytes", lambda _: self.cached)
        monkeypatch.setattr(device_memory, "grow", self.grow)
        monkeypatch.setattr(DeviceShare, "measure_workspace", lambda _: GIB)

    def empty_cache(self) -> None:
        self.free, self.cached = self.free + self.cached, 0

    def grow(self, size: int, _: torch.device) -> bool:
        taken = max(0, size - self.cached)
        if taken > self.free:
            return False
        self.free, self.cached = self.free - taken, self.cached + taken
        return True


class FakePool:
    """Bytes of a GPU, as long as it lives."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        if size > gpu.free:
            raise torch.OutOfMemoryError
        self.gpu, self.size = gpu, size
        gpu.free -= size

    def __del__(self) -> None:
        if hasattr(self, "gpu"):
            self.gpu.free += self.size


def claim(gpu: Gpu, share: DeviceShare, *arguments: Any) -> tuple[int, Any]:
    return share.claim(*arguments, lambda size: cast(KvPool, FakePool(gpu, size)))


def test_what_an_engine_claims_is_gone_from_the_device(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch, 62 * GIB)
    share = DeviceShare(model.decoder, 64)
    size, pool = claim(gpu, share, 0.5, None, GIB)
    assert size == 30 * GIB
    assert (gpu.free, gpu.cached) == (30 * GIB, 2 * GIB)  # with what prompts and graphs take
    del pool
    share.release()
    gpu.empty_cache()
    other = DeviceShare(model.decoder, 64)
    assert claim(gpu, other, 0.5, 50 * GIB, 0)[0] == 50 * GIB
    other.release()
    assert DeviceShare.claims() == 0


def test_two_engines_of_one_process_do_not_promise_the_same_bytes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch, 61 * GIB)
    one, other = DeviceShare(model.decoder, 64), DeviceShare(model.decoder, 64)
    first = claim(gpu, one, 0.5, None, 0)
    second = claim(gpu, other, 0.5, None, 0)
    assert (first[0], second[0]) == (30 * GIB, (30 - 1) * GIB // 2)
    assert gpu.cached == 2 * GIB, "each has its own to work in"
    assert gpu.free + gpu.cached + first[0] + second[0] == 61 * GIB
    for share in (one, other):
        share.release()
    assert DeviceShare.claims() == 0


def test_memory_that_a_neighbour_takes_meanwhile_is_counted_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch, 61 * GIB)
    grow = gpu.grow

    def beaten(size: int, device: torch.device) -> bool:
        if gpu.free == 61 * GIB - 54 * GIB:  # another server was faster
            gpu.free -= 7 * GIB
        return grow(size, device)

    monkeypatch.setattr(device_memory, "grow", beaten)
    share = DeviceShare(model.decoder, 64)
    size, pool = claim(gpu, share, 0.9, None, 0)
    assert size == int((54 - 1) * 0.9 * GIB)
    del pool
    share.release()
    gpu.empty_cache()
    monkeypatch.setattr(device_memory, "grow", lambda *_: False)
    with pytest.raises(DeviceMemoryExhausted, match=r"54\.0 GiB were free"):
        claim(gpu, share, 0.9, None, 0)
    assert gpu.free == 54 * GIB


def test_a_pool_has_no_more_slots_than_attention_can_count(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LARGEST_STRIDE", 16 * 100)
    with engine(model, limits=Limits(session_bytes=GIB)) as running:
        running.ready.result(30)
        token = kv_bytes(model.decoder.spec, model.decoder.dtype, 1)
        assert running.session_bytes == 99 * token


def test_weights_that_do_not_fit_are_not_begun_to_be_copied(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 80 * GIB))
    weights = {"w": torch.empty(3 * GIB, dtype=torch.uint8, device="meta")}
    with pytest.raises(
        DeviceMemoryExhausted, match=r"need 3\.0 GiB of cuda:0, .* 1\.0 GiB are free"
    ):
        decoder_on_device(model.decoder.spec, weights, torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 bytes"), (900, "900 bytes"), (5000, "4.9 KiB"), (60 * GIB + GIB // 10, "60.1 GiB")],
)
def test_sizes_are_said_in_a_unit_that_suits_them(size: int, said: str) -> None:
    assert format_bytes(size) == said
