"""The cost of kept sessions for running ones: compares servers that keep 10 and 20,000 sessions.

Each server is a process of its own with a tiny random model, whose steps are so short that any work
per kept session would be visible. This process is the gRPC client; the servers take turns. Nothing
should be slower with more kept sessions: the ceiling is the server that keeps few.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter

import grpc
import uvloop
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.processes import address, started
from benchmarks.random_model import word_tokenizer
from benchmarks.report import Rounds, finish
from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_client import AsyncGriffinClient, GriffinClient, Tokens

ONE = {"max_tokens": 1, "ignore_eos": True}
STREAM = {"max_tokens": 400, "ignore_eos": True}
AT_ONCE = 16
VOCABULARY = 1000


def write_tiny_model(directory: Path) -> Path:
    """Writes a random llama of 150,000 weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    word_tokenizer(VOCABULARY).save_pretrained(directory)
    return directory


async def keep(target: str, count: int) -> None:
    """Has a server keep ``count`` sessions of two tokens."""
    left = iter(range(count))

    async def caller(client: AsyncGriffinClient) -> None:
        for number in left:
            await client.complete(
                token_ids=[number % VOCABULARY], **ONE, keep_session=True, sharing="private"
            )

    async with AsyncGriffinClient(target) as client:
        await asyncio.gather(*(caller(client) for _ in range(AT_ONCE)))


def one_token(client: GriffinClient) -> float:
    """Returns the seconds of a request of one token, mostly admission; the median of several."""
    seconds = []
    for number in range(50):
        clock = perf_counter()
        client.complete(token_ids=[number], **ONE)
        seconds.append(perf_counter() - clock)
    return statistics.median(seconds)


def next_turn(client: GriffinClient, session_id: str) -> float:
    """Returns the seconds of a kept session's next turn."""
    clock = perf_counter()
    client.complete(token_ids=[1], **ONE, session_id=session_id, keep_session=True)
    return perf_counter() - clock


def step(client: GriffinClient) -> float:
    """Returns the mean seconds between two tokens of a stream."""
    events = client.generate(token_ids=[1, 2, 3], **STREAM)
    moments = [perf_counter() for event in events if isinstance(event, Tokens)]
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def page(stub: generation_pb2_grpc.GenerationServiceStub, size: int) -> float:
    """Returns the seconds of one page of ListSessions."""
    clock = perf_counter()
    stub.ListSessions(pb.ListSessionsRequest(page_size=size))
    return perf_counter() - clock


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"process {pid} has ended")


def main() -> None:
    parser = argparse.ArgumentParser(description="What kept sessions cost those that run.")
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--many", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    candidates: dict[str, Callable[[], float]] = {}
    held: dict[int, int] = {}
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = str(write_tiny_model(home / "model"))
        for count in (options.few, options.many):
            log = home / f"log-{count}"
            limits = ("--session-memory-gib", "4", "--idle-memory-gib", "3")
            server = stack.enter_context(
                started("--model", model, "--session-ttl-s", "86400", *limits, log=log)
            )
            target = address(server, log)
            client = stack.enter_context(GriffinClient(target))
            channel = stack.enter_context(grpc.insecure_channel(target))
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            uvloop.run(keep(target, min(count, AT_ONCE)))  # warms up
            before, clock = resident_bytes(server.pid), perf_counter()
            uvloop.run(keep(target, max(0, count - AT_ONCE)))
            held[count] = resident_bytes(server.pid) - before
            found = stub.ListSessions(pb.ListSessionsRequest(page_size=1))
            print(f"{found.total_size} sessions kept after {perf_counter() - clock:.0f} s more")
            own = found.sessions[0].session_id
            candidates[f"one token, {count}"] = partial(one_token, client)
            candidates[f"next turn, {count}"] = partial(next_turn, client, own)
            candidates[f"step, {count}"] = partial(step, client)
            candidates[f"page of 10, {count}"] = partial(page, stub, 10)
            candidates[f"page of 1000, {count}"] = partial(page, stub, 1000)
        rounds = Rounds(candidates, rounds=options.rounds)
    ms = rounds.median_ms(3)
    works = ("one token", "next turn", "step", "page of 10")
    ratios = {
        work: rounds.ratio(f"{work}, {options.many}", f"{work}, {options.few}") for work in works
    }
    for name, own_ms in ms.items():
        print(f"{name:>24} kept: {own_ms:8.3f} ms")
    each = held[options.many] / max(1, options.many - AT_ONCE)
    print(f"{', '.join(f'{work} x {ratio}' for work, ratio in ratios.items())}; {each:.0f} B each")
    finish(
        "kept",
        {"few": options.few, "many": options.many, "ms": ms, "ratios": ratios, "bytes_each": each},
    )


if __name__ == "__main__":
    main()
