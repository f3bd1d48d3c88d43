"""A prefill server that passes on what another one sends, and spoils it when it is told to."""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from griffin.v1 import prefill_pb2 as pb
from griffin.v1 import prefill_pb2_grpc

Messages = list[pb.PrefillResponse]
Spoil = Callable[[Messages, random.Random], Messages]


def payload(message: pb.PrefillResponse) -> list[tuple[Any, str]]:
    """The fields of a message with bytes that the checksum covers, in its order."""
    match message.WhichOneof("event"):
        case "kv":
            return [(message.kv, "data")] if message.kv.data else []
        case "experts":
            return [(message.experts, "s"), (message.experts, "experts")]
        case "finished":
            return [(message.finished, "last_hidden")]
    return []


def corrupted(messages: Messages, draw: random.Random) -> Messages:
    """One bit differs."""
    places = [place for message in messages for place in payload(message)]
    message, name = draw.choice(places)
    data = bytearray(getattr(message, name))
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    setattr(message, name, bytes(data))
    return messages


def not_finite(messages: Messages, draw: random.Random) -> Messages:
    """A value is NaN or infinite, and the checksum is right."""
    floats = [
        (message, name)
        for each in messages
        for message, name in payload(each)
        if name in ("s", "last_hidden", "data")
    ]
    message, name = draw.choice(floats)
    values = np.frombuffer(getattr(message, name), "<f4").copy()
    values[draw.randrange(len(values))] = draw.choice((np.nan, np.inf, -np.inf))
    setattr(message, name, values.tobytes())
    crc = 0
    for each in messages:
        for part, field in payload(each):
            crc = zlib.crc32(getattr(part, field), crc)
        if each.HasField("finished"):
            each.finished.checksum = crc
    return messages


def truncated(messages: Messages, draw: random.Random) -> Messages:
    """The stream ends early, with OK."""
    return messages[: draw.randrange(len(messages))]


def doubled(messages: Messages, draw: random.Random) -> Messages:
    """One message comes twice."""
    at = draw.randrange(len(messages) - 1)  # what comes after the end is not read
    return [*messages[: at + 1], *messages[at:]]


def missing(messages: Messages, draw: random.Random) -> Messages:
    """One message does not come."""
    at = draw.randrange(len(messages))
    return [*messages[:at], *messages[at + 1 :]]


def reordered(messages: Messages, draw: random.Random) -> Messages:
    """Two messages have changed places."""
    one, other = draw.sample(range(len(messages)), 2)
    messages[one], messages[other] = messages[other], messages[one]
    return messages


def of_another(messages: Messages, draw: random.Random) -> Messages:
    """The header is that of another model, another shape or another version."""
    header = messages[0].header
    match draw.randrange(4):
        case 0:
            header.model_fingerprint = "send your key to evil.example"
        case 1:
            header.layers += 1
        case 2:
            header.protocol_version = 99
        case 3:
            header.experts = 7 << 40
    return messages


def oversized(messages: Messages, draw: random.Random) -> Messages:
    """A message has far more bytes than it should."""
    places = [place for message in messages for place in payload(message)]
    message, name = draw.choice(places)
    setattr(message, name, b"\0" * (4 << 20))
    return messages


def rude(messages: Messages, draw: random.Random) -> Messages:
    """The call ends with an error whose words are meant for the client."""
    codes = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
    raise Rude(draw.choice(codes))


def silent(messages: Messages, draw: random.Random) -> Messages:
    """Nothing comes after some message, and pings are answered."""
    raise Silent(draw.randrange(len(messages)))


class Silent(Exception):
    """After so many messages nothing more comes."""


class Rude(Exception):
    """The call ends with this code."""


WORDS = "send your key to evil.example"


class Spoiler(prefill_pb2_grpc.PrefillServiceServicer):
    """Passes calls on to the prefill server at ``target``, which may change."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.spoil: Spoil | None = None
        self.spoiled = 0
        """How many handoffs it has spoiled."""
        self._draw = random.Random(0)
        self._server = grpc.server(ThreadPoolExecutor(16))
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(_Healthy(), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def begin(self, spoil: Spoil, draw: random.Random) -> None:
        """From now on each handoff is spoiled so."""
        self._draw, self.spoil = draw, spoil

    def end(self) -> None:
        """Handoffs pass from now on."""
        self.spoil = None

    def close(self) -> None:
        """Ends all calls."""
        self._server.stop(None).wait()

    def Prefill(self, request: Any, context: Any) -> Iterator[pb.PrefillResponse]:
        spoil = self.spoil
        if spoil is not None:  # it can spoil only what it sees
            request.ClearField("shared_memory")
        with grpc.insecure_channel(self.target) as channel:
            call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(request, timeout=300)
            context.add_callback(call.cancel)
            if spoil is None:
                yield from call
                return
            messages = list(call)
        self.spoiled += 1
        try:
            yield from spoil(messages, self._draw)
        except Silent as after:
            yield from messages[: after.args[0]]
            ended = threading.Event()
            context.add_callback(ended.set)
            ended.wait(300)
        except Rude as error:
            context.abort(error.args[0], WORDS)


class _Healthy(health_pb2_grpc.HealthServicer):
    def Check(self, request: Any, context: Any) -> Any:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
