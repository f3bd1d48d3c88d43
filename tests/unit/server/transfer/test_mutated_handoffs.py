"""Whatever a prefill server sends, the call ends as if it had not sent it, and so does the next."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from griffin.v1 import prefill_pb2 as pb
from griffin_core.model.load import Model
from griffin_server.prefill_pool import health, router
from tests.fuzzing import fill, mutated
from tests.servers import Running, running

HANDOFFS = [60, pytest.param(2_000, marks=pytest.mark.slow)]

METHOD = "/griffin.v1.PrefillService/Prefill"
CHECK = "/grpc.health.v1.Health/Check"
SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
REQUEST: dict[str, Any] = {
    "token_ids": [3 + 7 * n % 200 for n in range(40)],
    "max_tokens": 6,
    "density": 0.5,
    "ignore_eos": True,
    "temperature": 0.0,
}


def bytes_changed(draw: random.Random, messages: list[bytes]) -> None:
    """A message has other bytes, and may be none any more."""
    at = draw.randrange(len(messages))
    messages[at] = mutated(draw, messages[at], times=draw.choice([1, 1, 3]))


def field_changed(draw: random.Random, messages: list[bytes]) -> None:
    """Some fields of a message have usual, odd or extreme values."""
    at = draw.randrange(len(messages))
    message = pb.PrefillResponse.FromString(messages[at])
    event = getattr(message, message.WhichOneof("event"))
    fill(draw, event, share=draw.choice([0.1, 0.5]), odd=0.5)
    messages[at] = message.SerializeToString()


def message_moved(draw: random.Random, messages: list[bytes]) -> None:
    """A message comes earlier or later."""
    message = messages.pop(draw.randrange(len(messages)))
    messages.insert(draw.randrange(len(messages) + 1), message)


def message_lost(draw: random.Random, messages: list[bytes]) -> None:
    """A message does not come."""
    messages.pop(draw.randrange(len(messages)))


def message_made_up(draw: random.Random, messages: list[bytes]) -> None:
    """A message comes that belongs to nothing."""
    message = pb.PrefillResponse()
    event = draw.choice(["header", "kv", "experts", "finished"])
    getattr(message, event).SetInParent()
    fill(draw, getattr(message, event), share=0.5, odd=0.5)
    messages.insert(draw.randrange(len(messages)), message.SerializeToString())


def cut_short(draw: random.Random, messages: list[bytes]) -> None:
    """The stream ends early."""
    del messages[draw.randrange(len(messages)) :]


MUTATIONS = (
    *(bytes_changed, bytes_changed, field_changed, field_changed),
    *(message_moved, message_lost, message_made_up, cut_short),
)


class Mutator(grpc.GenericRpcHandler):
    """A prefill server that passes on what another one sends, byte for byte, or mutates it."""

    def __init__(self, target: str) -> None:
        self.mutate: Callable[[list[bytes]], None] | None = None
        self.mutated = self.checks = 0
        self._channel = grpc.insecure_channel(target)
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[self])
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, call: Any) -> Any:
        """The handler of a method."""
        if call.method == CHECK:
            return grpc.unary_unary_rpc_method_handler(self._check)
        if call.method == METHOD:
            return grpc.unary_stream_rpc_method_handler(self._prefill)
        return None

    def _check(self, request: bytes, context: Any) -> bytes:
        """That it serves; every other time in bytes that are no message."""
        self.checks += 1
        return b"\xff" if self.checks % 2 else SERVING.SerializeToString()

    def _prefill(self, request: bytes, context: Any) -> Iterator[bytes]:
        messages = list(self._channel.unary_stream(METHOD)(request, timeout=30))
        if self.mutate is not None:
            self.mutated += 1
            self.mutate(messages)
        yield from messages

    def close(self) -> None:
        """Ends all calls."""
        self._server.stop(None).wait()
        self._channel.close()


@pytest.fixture
def servers(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Running, Mutator]]:
    """A decode server between a mutating prefill server, which is the first, and a good one. One
    that has failed does not rest for long."""
    monkeypatch.setattr(health, "PROBE_S", 0.1)
    monkeypatch.setattr(router, "MISMATCH_S", 0.0)
    model = tiny("llama")
    with running(model, role="prefill") as prefill:
        mutator = Mutator(prefill.target)
        targets = f"{mutator.target},{prefill.target}"
        try:
            with running(
                model,
                role="decode",
                prefill_target=targets,
                handoff="messages",
                handoff_timeout_s=5,
            ) as decode:
                yield decode, mutator
        finally:
            mutator.close()


@pytest.mark.parametrize("handoffs", HANDOFFS)
@pytest.mark.timeout(1200)
def test_no_mutated_handoff_is_seen_by_a_client(
    servers: tuple[Running, Mutator], handoffs: int
) -> None:
    decode, mutator = servers
    draw = random.Random(handoffs)
    with decode.client() as client:
        quiet = client.complete(**REQUEST).token_ids

        def check(name: str) -> None:
            assert client.complete(**REQUEST).token_ids == quiet, name

        while (number := mutator.mutated) < handoffs:  # one that failed rests for a while
            mutation = draw.choice(MUTATIONS)
            mutator.mutate = lambda messages, way=mutation: way(draw, messages)
            check(f"{number}: {mutation.__name__}")
            mutator.mutate = None
            check(f"after {number}: {mutation.__name__}")
        assert list(client.list_sessions()) == []


def test_a_message_that_cannot_be_parsed_fails_its_handoff(
    servers: tuple[Running, Mutator],
) -> None:
    decode, mutator = servers

    def nonsense(messages: list[bytes]) -> None:
        messages[0] = b"\xff"

    with decode.client() as client:
        quiet = client.complete(**REQUEST).token_ids
        mutator.mutate = nonsense
        assert client.complete(**REQUEST).token_ids == quiet
        assert mutator.mutated == 1
