"""How calls end when something else happens: cancelled, killed, shut down. Nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from griffin_client import (
    Event,
    Finished,
    GriffinClient,
    GriffinClientError,
    Tokens,
    Unavailable,
)
from griffin_core.forward.prompt import (
    Prompt,
)
from griffin_core.kv.cache import KvCache
from griffin_core.model.load import Model
from tests.e2e.test_load import PROMPT, in_handoff, prefill_command
from tests.e2e.texts import LICENCE, cut
from tests.servers import Process, Running, eventually, running, segments

pytestmark = pytest.mark.e2e

ENDLESS = {"max_tokens": 5000, "ignore_eos": True}
FEW = {"max_tokens": 3, "ignore_eos": True}


def held(server: Running) -> tuple[int, int]:
    """Sessions and bytes: as the engine counts them, and as the KV caches that are alive say."""
    infos = server.app.engine.sessions().result(30)
    gc.collect()
    alive = sum(o.nbytes for o in gc.get_objects() if type(o) is KvCache)
    return len(infos), sum(info.reserved_bytes for info in infos) + alive


@pytest.fixture
def one_at_a_time(smollm2: Model, with_and_without_traces: bool) -> Iterator[Running]:
    with running(smollm2, max_sessions=1, density=0.5) as server:
        yield server


def test_a_client_that_cancels_in_the_queue_leaves_nothing(one_at_a_time: Running) -> None:
    with one_at_a_time.client() as client:
        holder = client.generate("a", **ENDLESS)
        next(holder)
        waiting = client.generate("b", **ENDLESS)
        thread = threading.Thread(target=lambda: next(waiting, None), daemon=True)
        thread.start()
        states = lambda: [s.state for s in client.list_sessions()]  # noqa: E731
        eventually(lambda: states() == ["decode", "queued"])
        with one_at_a_time.client() as other:  # its own connection, then gone
            third = other.generate("c", **ENDLESS)
            threading.Thread(target=lambda: swallow(third), daemon=True).start()
            eventually(lambda: states() == ["decode", "queued", "queued"])
        eventually(lambda: states() == ["decode", "queued"])
        holder.close()  # type: ignore[attr-defined]
        thread.join(30)
        eventually(lambda: states() == ["decode"])  # the one that waited
    eventually(lambda: held(one_at_a_time) == (0, 0))


def swallow(events: Iterator[Event]) -> None:
    try:
        next(events)
    except GriffinClientError:
        return


def test_a_client_that_cancels_during_prefill_stops_it_within_a_chunk(
    one_at_a_time: Running, smollm2: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []  # the tokens of each pass
    next_ids = Prompt.next_ids
    monkeypatch.setattr(
        Prompt, "next_ids", lambda prompt, n: (turns.append(n), next_ids(prompt, n))[1]
    )
    ids = cut(LICENCE, 2000, smollm2.tokenizer) * 4  # 16 chunks
    with one_at_a_time.client() as client:
        events = client.generate(token_ids=ids[:8000], **FEW)
        thread = threading.Thread(target=lambda: swallow(events), daemon=True)
        thread.start()
        eventually(lambda: len(turns) >= 2)
        assert [s.state for s in client.list_sessions()] == ["prefill"]
    # The client has gone, and its calls with it.
    eventually(lambda: held(one_at_a_time) == (0, 0))
    eventually(lambda: not one_at_a_time.app.engine.snapshot().result(30).prefills.queued)
    assert len(turns) <= 6
    with one_at_a_time.client() as client:
        assert client.complete("a", **FEW).finished.usage.generated_tokens == 3


def test_a_client_that_cancels_during_decode_leaves_nothing(one_at_a_time: Running) -> None:
    with one_at_a_time.client() as client:
        for _ in range(3):
            events = client.generate("Once upon a time", **ENDLESS)
            while not isinstance(next(events), Tokens):
                pass
            sessions, size = held(one_at_a_time)
            assert sessions == 1 and size > 0
            events.close()  # type: ignore[attr-defined]
            eventually(lambda: held(one_at_a_time) == (0, 0))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("handoff", ["shared_memory", "messages"])
def test_a_prefill_server_killed_during_a_handoff(
    handoff: str, tiny: Callable[[str], Model], tiny_directory: Callable[[str], Path]
) -> None:
    model = tiny("llama-long")
    options = prefill_command(str(tiny_directory("llama-long")))
    before = segments()
    with Process(*options) as prefill:
        target = prefill.target()
        with (
            running(model, role="decode", prefill_target=target, handoff=handoff) as decode,
            decode.client() as client,
        ):
            received: list[Event] = []
            failure: list[Exception] = []

            def call() -> None:
                try:
                    received.extend(client.generate(token_ids=PROMPT, **FEW))
                except GriffinClientError as error:
                    failure.append(error)

            thread = threading.Thread(target=call)
            thread.start()
            eventually(lambda: in_handoff(decode))
            prefill.kill()
            thread.join(30)
            assert isinstance(failure[0], Unavailable), failure
            assert failure[0].reason in ("HANDOFF_BROKEN", "PREFILL_UNAVAILABLE")
            assert received == []
            eventually(lambda: held(decode) == (0, 0))
            with pytest.raises(Unavailable) as caught:
                client.complete("a", **FEW)
            assert caught.value.reason == "PREFILL_UNAVAILABLE"

            with Process(*options, "--port", target.rpartition(":")[2]) as again:
                again.target()
                done = client.complete("a", **FEW)
                assert done.finished.usage.generated_tokens == 3
    assert segments() == before


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("tokens", "grace_s", "finish"), [(40, 60, True), (5000, 0.5, False)], ids=["ends", "cut off"]
)
def test_sigterm_during_8_streams(tokens: int, grace_s: float, finish: bool) -> None:
    stopping = {"max_tokens": tokens, "ignore_eos": True}
    with (
        Process("--dtype", "float32", "--shutdown-grace-s", str(grace_s)) as server,
        GriffinClient(server.target(), max_retries=0) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        under_way = threading.Barrier(9)

        def stream(number: int) -> Finished | GriffinClientError:
            events = client.generate(f"Count to {number}:", **stopping)
            next(events)
            under_way.wait(60)
            try:
                *_, last = events
            except GriffinClientError as error:
                return error
            assert isinstance(last, Finished)
            return last

        streams = [pool.submit(stream, number) for number in range(8)]
        under_way.wait(60)
        server.terminate()
        ends = [each.result(120) for each in streams]
        assert server.wait() == 0
    for end in ends:
        if finish:
            assert isinstance(end, Finished) and end.usage.generated_tokens == tokens
        else:
            assert isinstance(end, Unavailable) and end.reason == "SHUTTING_DOWN"


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_that_still_loads(number: signal.Signals) -> None:
    """By the server's own doing, since process 1 of a container has nothing else."""
    with Process() as server:
        eventually(lambda: any("loading" in line for line in server.log), within_s=60)
        os.kill(server.pid, number)
        assert server.wait(2) == 128 + number


def test_a_second_signal_ends_what_the_first_lets_run(
    tiny_directory: Callable[[str], Path],
) -> None:
    model = ("--model", str(tiny_directory("llama-long")), "--dtype", "float32")
    with (
        Process(*model, "--shutdown-grace-s", "1000") as server,
        GriffinClient(server.target(), max_retries=0) as client,
    ):
        events = client.generate("a", max_tokens=4000, ignore_eos=True)
        next(events)
        server.terminate()
        eventually(lambda: any('"stopping"' in line for line in server.log))
        server.terminate()
        with pytest.raises(Unavailable):
            for _ in events:
                time.sleep(0.01)  # it would come to its end in 40 s
        assert server.wait() == 0


def test_servers_that_have_ended_leave_no_socket_and_no_memory(
    tiny_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tmp_path / "handoff"
    model = ("--model", str(tiny_directory("llama")), "--dtype", "float32")
    model += ("--handoff-dir", str(directory), "--local-prefill-max-tokens", "0")
    before = set(os.listdir("/dev/shm"))
    with (
        Process(*model, "--role", "prefill") as prefill,
        Process(*model, "--role", "decode", "--prefill-target", prefill.target()) as decode,
        GriffinClient(decode.target(), max_retries=0) as client,
    ):
        client.complete("a", **FEW)
        assert len(list(directory.iterdir())) == 1
        for process in (decode, prefill):
            process.terminate()
            assert process.wait() == 0
    assert list(directory.iterdir()) == []
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "griffin" in name]
