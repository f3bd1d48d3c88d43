"""What one caller can take from the others, seen from outside a real server."""

from __future__ import annotations

import contextlib
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
import torch

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import prefill_pb2
from griffin_client import GriffinClient, Tls, Tokens
from griffin_core.model.load import load_model
from griffin_server.security.api_keys import line_of
from tests.certificates import Authority
from tests.servers import SMALL_WINDOW, Process, eventually, free_port, prefill_request
from tests.tiny import make_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(300)]

GENERATE = "/griffin.v1.GenerationService/Generate"
PROMPT = [5 + n % 200 for n in range(4000)]
PREFILL = "/griffin.v1.PrefillService/Prefill"

LONG = "hello wor " * 419_000
LARGE = {
    "token ids": pb.GenerateRequest(token_ids=[1] * 4_190_000),
    "text": pb.GenerateRequest(text=LONG),
    "chat": pb.GenerateRequest(messages=[pb.ChatMessage(role="user", content=LONG)]),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama-long", tmp_path_factory.mktemp("model")))


@pytest.fixture
def smollm2() -> Iterator[tuple[Process, str]]:
    """With its address."""
    with Process("--max-request-bytes", str(4 << 20), "--threads", "1") as server:
        target = server.target()
        with GriffinClient(target) as client:
            client.complete("a", max_tokens=2)
        yield server, target


@pytest.mark.parametrize("asked", LARGE.values(), ids=LARGE)
def test_200_requests_of_4_mb_that_are_refused_take_little_and_hold_up_nobody(
    asked: pb.GenerateRequest, smollm2: tuple[Process, str]
) -> None:
    server, target = smollm2
    process, request = psutil.Process(server.pid), asked.SerializeToString()
    before, took, goes_on = process.memory_info().rss, [], True

    def small() -> None:
        with GriffinClient(target, max_retries=0) as client:
            while goes_on:
                clock = time.perf_counter()
                client.complete("a", max_tokens=1)
                took.append(time.perf_counter() - clock)
                time.sleep(0.02)

    def large(calls: int) -> None:
        with grpc.insecure_channel(target) as channel:
            call = channel.unary_stream(GENERATE)
            for _ in range(calls):
                with pytest.raises(grpc.RpcError) as caught:
                    next(call(request))
                refused = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
                assert caught.value.code() in refused

    beside = threading.Thread(target=small)
    beside.start()
    try:
        with ThreadPoolExecutor(40) as callers:
            for done in [callers.submit(large, 5) for _ in range(40)]:
                done.result()
    finally:
        goes_on = False
        beside.join()
    eventually(lambda: process.memory_info().rss - before < 300e6)
    assert statistics.median(took) < 0.5


FLOOD = """
import asyncio, sys
from griffin_client import AsyncGriffinClient, GriffinClientError, Tls
target, ca, key = sys.argv[1:]
async def stream(client):
    while True:
        try:
            async for _ in client.generate("a", max_tokens=400, ignore_eos=True):
                pass
        except GriffinClientError:
            pass
async def main():
    clients = [
        AsyncGriffinClient(target, tls=Tls(ca=ca), api_key=key, max_retries=5) for _ in range(3)
    ]
    await asyncio.gather(*(stream(client) for client in clients for _ in range(1000)))
asyncio.run(main())
"""


def test_3000_streams_of_one_caller_leave_anothers_first_token_within_a_second(
    tiny: str, tmp_path: Path
) -> None:
    """A client of a program of its own, that tries again whenever it is refused."""
    names = {name: f"griffin-{name:.>43}" for name in ("many", "one")}
    (tmp_path / "keys").write_text("\n".join(line_of(key, name) for name, key in names.items()))
    own = (authority := Authority(tmp_path)).issue("server", "127.0.0.1", "localhost")
    first: list[float] = []
    with Process(
        *("--model", tiny, "--threads", "1", "--api-keys", str(tmp_path / "keys")),
        *("--tls-cert", str(own.cert), "--tls-key", str(own.key)),
    ) as server:
        target, tls = server.target(), Tls(ca=authority.cert)
        with (
            GriffinClient(target, tls=tls, api_key=names["one"], max_retries=0) as client,
            GriffinClient(target, tls=tls, api_key=names["many"]) as beside,
            subprocess.Popen(
                [sys.executable, "-c", FLOOD, target, str(authority.cert), names["many"]]
            ) as flood,
        ):
            try:
                eventually(lambda: len(list(beside.list_sessions())) > 200, within_s=60)
                for _ in range(20):
                    clock = time.perf_counter()
                    stream = client.generate("b", max_tokens=2, ignore_eos=True)
                    next(event for event in stream if isinstance(event, Tokens))
                    first.append(time.perf_counter() - clock)
                    stream.close()
                assert len(list(beside.list_sessions())) > 200
            finally:
                flood.kill()
    assert statistics.median(first) < 1, first


def test_idle_connections_to_the_metrics_port_leave_descriptors_for_calls(tiny: str) -> None:
    port = free_port()
    with Process("--model", tiny, "--threads", "1", "--metrics-port", str(port)) as server:
        target = server.target()
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (128, 128))
        with contextlib.ExitStack() as idle:
            for _ in range(120):
                idle.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            for _ in range(5):
                with GriffinClient(target, max_retries=0) as client:
                    assert client.complete("a", max_tokens=1, timeout=10)


def test_slow_readers_of_prefill_do_not_hold_its_places(tiny: str) -> None:
    """Each takes a message whenever it would be told that it is too slow, and no sooner."""
    with Process(
        *("--model", tiny, "--dtype", "float32", "--threads", "1"),
        *("--role", "prefill", "--reader-timeout-s", "3"),
    ) as server:
        target = server.target()
        fingerprint = load_model(tiny, dtype=torch.float32).fingerprint
        with grpc.insecure_channel(target, options=SMALL_WINDOW) as channel:
            ended: list[grpc.StatusCode] = []

            def read_slowly() -> None:
                call = channel.unary_stream(
                    PREFILL, response_deserializer=prefill_pb2.PrefillResponse.FromString
                )(prefill_request(fingerprint, PROMPT))
                try:
                    for _ in call:
                        time.sleep(2)
                except grpc.RpcError as error:
                    ended.append(error.code())

            readers = [threading.Thread(target=read_slowly) for _ in range(4)]
            for reader in readers:
                reader.start()
            time.sleep(1)
            clock = time.monotonic()
            with grpc.insecure_channel(target) as other:
                list(
                    other.unary_stream(PREFILL)(
                        prefill_request(fingerprint, PROMPT[:16]), timeout=60
                    )
                )
            assert time.monotonic() - clock < 10
            for reader in readers:
                reader.join()
            assert ended == [grpc.StatusCode.ABORTED] * 4


@pytest.mark.slow
def test_what_2000_kept_sessions_hold_is_counted() -> None:
    """At least nine tenths of what they add to the memory of the process."""
    settings = ("--threads", "1", "--session-memory-gib", "4", "--idle-memory-gib", "3")
    with Process(*settings) as server, GriffinClient(server.target()) as client:
        process = psutil.Process(server.pid)

        def keep(number: int) -> None:
            client.complete(
                token_ids=[5 + number % 1000],
                max_tokens=1,
                repetition_penalty=1.2,
                keep_session=True,
                ignore_eos=True,
            )

        def counted() -> int:
            return sum(session.reserved_bytes for session in client.list_sessions())

        with ThreadPoolExecutor(16) as callers:
            list(callers.map(keep, range(300)))  # what the first calls need once
            held, before = process.memory_info().rss, counted()
            list(callers.map(keep, range(2000)))
        assert counted() - before >= 0.9 * (process.memory_info().rss - held)
