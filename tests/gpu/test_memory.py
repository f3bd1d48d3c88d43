"""Whose memory a GPU's is: engines and servers that divide one card as they start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from griffin_core.engine.device_memory import DeviceShare
from griffin_core.engine.events import Finished
from griffin_core.engine.limits import Limits
from griffin_core.errors import DeviceMemoryExhausted
from griffin_core.kv.pool import kv_bytes
from griffin_core.model.load import Model, load_model
from tests.gpu.devices import needs_cuda
from tests.gpu.test_cuda import task
from tests.servers import Process
from tests.tiny import make_tiny
from tests.unit.core.engines import complete, engine, finish, submit

pytestmark = [pytest.mark.gpu, needs_cuda]

MIB, GIB = 1 << 20, 1 << 30
# A quarter of the card, since a pool has at most 2^31 / head_dim slots: with a model of kilobytes,
# that is less than half of a large card.
LEFTOVER = GIB
"""What a context, graphs and a model of kilobytes may take or keep beside what is claimed."""


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return make_tiny("llama", tmp_path / "llama")


@pytest.fixture
def model(where: Path) -> Iterator[Model]:
    yield load_model(str(where), dtype=torch.bfloat16, device="cuda")
    assert DeviceShare.claims() == 0


def free() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_an_engine_takes_its_share_at_once_and_gives_it_back(model: Model) -> None:
    before = free()
    with engine(model, prefill_source=None, limits=Limits(memory_fraction=0.25)) as running:
        running.ready.result(300)
        size = running.session_bytes
        assert abs(size - before / 4) < LEFTOVER
        left, _ = torch.cuda.mem_get_info()
        assert left <= before - size
        for density in (1.0, 0.5):
            assert isinstance(complete(running, task(density))[1], Finished)
        assert 0 < running.peak_bytes < size
    assert free() > before - LEFTOVER


def test_two_engines_on_one_card_divide_it(model: Model) -> None:
    before = free()
    quarter = Limits(memory_fraction=0.25)
    with engine(model, prefill_source=None, limits=quarter) as first:
        first.ready.result(300)
        with engine(model, prefill_source=None, limits=quarter) as second:
            second.ready.result(300)
            assert abs(second.session_bytes - first.session_bytes * 3 / 4) < LEFTOVER
            assert first.session_bytes + second.session_bytes < before
            for running in (first, second):
                assert isinstance(complete(running, task(0.5))[1], Finished)


def test_what_is_claimed_is_there_though_others_take_all_the_rest(model: Model) -> None:
    """The KV of all sessions, and what steps and a prompt's chunk work in."""
    limits = Limits(memory_fraction=0.5, max_sessions=4)
    with engine(model, prefill_source=None, limits=limits) as running:
        running.ready.result(300)
        left, _ = torch.cuda.mem_get_info()
        rest = torch.empty(left - 64 * MIB, dtype=torch.uint8, device="cuda")
        for density in (1.0, 0.5):
            inboxes = [submit(running, task(density, prompt=200))[1] for _ in range(4)]
            assert all(isinstance(finish(inbox)[1], Finished) for inbox in inboxes)
        del rest


def test_a_budget_can_be_used_to_its_last_byte(model: Model) -> None:
    """Two sessions that fill the KV pool run at once, and a third after them."""
    spec, dtype = model.decoder.spec, model.decoder.dtype
    size = 2 * kv_bytes(spec, dtype, 200)
    limits = Limits(session_bytes=size, max_sessions=4)
    with engine(model, prefill_source=None, limits=limits) as running:
        running.ready.result(300)
        inboxes = [submit(running, task(1.0, prompt=100, tokens=100))[1] for _ in range(3)]
        ends = [finish(inbox) for inbox in inboxes]
        assert [len(tokens) for tokens, _ in ends] == [100] * 3
        assert running.peak_bytes == size


def test_more_than_there_is_is_refused(model: Model) -> None:
    with (
        engine(model, limits=Limits(session_bytes=10_000 * GIB)) as running,
        pytest.raises(DeviceMemoryExhausted, match=r"got 10000; cuda:?0? has"),
    ):
        running.ready.result(300)


def test_the_second_server_takes_its_fraction_of_what_is_left(where: Path) -> None:
    arguments = ("--model", str(where), "--dtype", "bfloat16", "--max-sessions", "2")
    sizes = []
    with ExitStack() as servers:
        for _ in range(2):
            server = servers.enter_context(Process(*arguments, "--memory-fraction", "0.25"))
            server.target()
            (serving,) = [json.loads(line) for line in server.log if '"serving"' in line]
            sizes.append(serving["session_bytes"])
        with Process(*arguments, "--session-memory-gib", "10000") as third:
            assert third.wait(120) == 1
            assert third.log[-1].startswith("griffin: session_memory_gib: got 10000; cuda")
            assert "Traceback" not in "".join(third.log)
    assert abs(sizes[1] - sizes[0] * 3 / 4) < GIB  # with the context and the graphs of each
