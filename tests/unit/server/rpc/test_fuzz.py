"""Whatever bytes a call brings, it ends with a status of the table, one log line and one count."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from structlog.testing import capture_logs

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import prefill_pb2
from griffin_client.status_details import parse_details
from griffin_core.model.load import Model
from griffin_server.rpc.reflection import SERVICES as REFLECTION
from tests.fuzzing import fill, mutated
from tests.servers import Running, eventually, prefill_request, running

MESSAGES = [150, pytest.param(10_000, marks=pytest.mark.slow)]
"""Of a fuzz."""

METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in (pb.DESCRIPTOR, prefill_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}

MALFORMED = {
    "a field that is longer than the message": bytes.fromhex("0aff01616263"),
    "a tag that does not end": b"\xff" * 11,
    "a group that does not end": b"\x0b",
    "a group that ends and never began": b"\x0c",
    "half a fixed64": b"\x09\x01\x02",
}


@dataclass(frozen=True)
class Server:
    """A server and a connection to it that sends and gives bytes."""

    running: Running
    channel: grpc.Channel
    role: str

    def call(self, method: str, request: bytes, streams: bool, **options: Any) -> str:
        """How a call ends: the name of its code."""
        try:
            if streams:
                for _ in self.channel.unary_stream(method)(request, timeout=60, **options):
                    pass
            else:
                self.channel.unary_unary(method)(request, timeout=60, **options)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    def counted(self, name: str) -> Counter[tuple[str, str]]:
        """Calls of ``griffin.v1`` by method and code, of a family of the metrics."""
        return Counter(
            {
                (
                    f"/{sample.labels['grpc_service']}/{sample.labels['grpc_method']}",
                    sample.labels.get("grpc_code", ""),
                ): int(sample.value)
                for family in self.running.app.metrics.registry.collect()
                for sample in family.samples
                if sample.name == name
            }
        )


@pytest.fixture(scope="module", params=["all", "prefill"])
def started(request: pytest.FixtureRequest, tiny: Callable[[str], Model]) -> Iterator[Server]:
    with (
        running(tiny("llama"), role=request.param) as serving,
        grpc.insecure_channel(serving.target) as channel,
    ):
        yield Server(serving, channel, request.param)


@pytest.fixture
def server(started: Server) -> Server:
    """The server, when the last test's calls have ended on its side as well."""
    eventually(lambda: not started.running.app.listener.drain.active)
    return started


def served(server: Server) -> dict[str, MethodDescriptor]:
    """The methods of its role."""
    service = {"all": "GenerationService", "prefill": "PrefillService"}[server.role]
    return {
        name: method
        for name, method in METHODS.items()
        if method.containing_service.name == service
    }


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED)
def test_bytes_that_are_no_message_are_invalid(server: Server, malformed: bytes) -> None:
    methods = served(server)
    before = server.counted("grpc_server_handled_total")
    with capture_logs() as logs:
        for name, method in methods.items():
            code = server.call(name, malformed, method.server_streaming)
            assert code == "INVALID_ARGUMENT", name
        eventually(lambda: not server.running.app.listener.drain.active)
    assert [(entry["event"], entry["code"]) for entry in logs] == [
        ("call", "INVALID_ARGUMENT")
    ] * len(methods)
    counted = server.counted("grpc_server_handled_total") - before
    assert counted == {(name, "INVALID_ARGUMENT"): 1 for name in methods}


@pytest.mark.parametrize("text", [b"\xed\xa0\x80", b"\xff", b"abc\x80", b"\xf0\x9f\x98"])
def test_text_that_is_not_utf_8_is_invalid(server: Server, text: bytes) -> None:
    for name, method in served(server).items():
        fields = [f for f in method.input_type.fields if f.type == FieldDescriptor.TYPE_STRING]
        for field in fields:
            tag = _varint(field.number << 3 | 2)
            request = tag + bytes([len(text)]) + text
            assert server.call(name, request, method.server_streaming) == "INVALID_ARGUMENT"


def test_an_invalid_message_is_told_what_it_is_not(server: Server) -> None:
    for name, method in served(server).items():
        with pytest.raises(grpc.RpcError) as caught:
            list(server.channel.unary_stream(name)(b"\x0b", metadata=(("x-request-id", "mine"),)))
        error = caught.value
        assert f"griffin.v1.{method.input_type.name}" in error.details()
        details = parse_details((*error.initial_metadata(), *error.trailing_metadata()))
        assert details.reason == "INVALID_REQUEST" and list(details.violations) == ["request"]
        assert details.request_id == "mine"


def test_health_and_reflection_refuse_them_too(server: Server) -> None:
    with capture_logs() as logs:
        for method, streams in (("Check", False), ("Watch", True)):
            name = f"/grpc.health.v1.Health/{method}"
            assert server.call(name, b"\x0b", streams) == "INVALID_ARGUMENT"
        for service in REFLECTION:
            calling = server.channel.stream_stream(f"/{service}/ServerReflectionInfo")
            with pytest.raises(grpc.RpcError) as caught:
                list(calling(iter([b"\x3a\x00", b"\x0b"]), timeout=60))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert logs == []
    check = health_pb2.HealthCheckRequest().SerializeToString()
    assert server.call("/grpc.health.v1.Health/Check", check, streams=False) == "OK"


def test_a_method_that_is_not_there_is_unimplemented(server: Server) -> None:
    for name in ("/griffin.v1.GenerationService/Generat", "/griffin.v2.GenerationService/Generate"):
        assert server.call(name, b"", streams=False) == "UNIMPLEMENTED"
    for name in METHODS.keys() - served(server).keys():
        assert server.call(name, b"", streams=False) == "UNIMPLEMENTED"


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.timeout(1200)
def test_no_message_ends_a_call_with_a_fault_of_the_server(server: Server, messages: int) -> None:
    rng = random.Random(messages)
    methods = sorted(served(server).items())
    model = server.running.app.engine.model
    good = good_call(server.role, model)
    before = server.counted("grpc_server_handled_total")
    begun_before = server.counted("grpc_server_started_total")
    ended: Counter[tuple[str, str]] = Counter()
    with capture_logs() as logs:
        for _ in range(messages):
            name, method = rng.choice(methods)
            request = made(rng, method, model)
            code = server.call(name, request, method.server_streaming)
            assert code not in ("UNKNOWN", "INTERNAL", "UNIMPLEMENTED"), (name, request.hex())
            if not parses(method, request):
                assert code == "INVALID_ARGUMENT", (name, request.hex())
            ended[name, code] += 1
            assert server.call(*good) == "OK", (name, request.hex())
            ended[good[0], "OK"] += 1
        eventually(lambda: not server.running.app.listener.drain.active)
    assert Counter((entry["method"], entry["code"]) for entry in logs) == ended
    assert server.counted("grpc_server_handled_total") - before == ended
    begun = server.counted("grpc_server_started_total") - begun_before
    assert begun.total() == 2 * messages
    assert {"OK", "INVALID_ARGUMENT"} <= {code for _, code in ended}


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.timeout(1200)
def test_no_message_harms_health_or_reflection(server: Server, messages: int) -> None:
    rng = random.Random(messages)
    check, watch = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")
    known = health_pb2.HealthCheckRequest(service="griffin.v1.GenerationService")
    seeds = {
        check: (health_pb2.HealthCheckRequest(), known),
        watch: (health_pb2.HealthCheckRequest(), known),
        **dict.fromkeys(
            (f"/{service}/ServerReflectionInfo" for service in REFLECTION),
            (
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_by_filename="griffin/v1/prefill.proto"),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="griffin.v1.Token"),
            ),
        ),
    }
    for _ in range(messages):
        name = rng.choice(sorted(seeds))
        request = mutated(rng, rng.choice(seeds[name]).SerializeToString(), times=rng.randint(0, 3))
        code = first_of(server.channel, name, request)
        assert code not in ("UNKNOWN", "INTERNAL", "UNIMPLEMENTED"), (name, request.hex())
        assert server.call(check, b"", streams=False) == "OK"


def first_of(channel: grpc.Channel, name: str, request: bytes) -> str:
    """How a call ends, or that it has an answer: those that watch do not end."""
    if name.endswith("/Check"):
        call = channel.unary_stream(name)(request, timeout=60)
    else:
        call = channel.stream_stream(name)(iter([request]), timeout=60)
    try:
        next(call, None)
    except grpc.RpcError as error:
        return str(error.code().name)
    finally:
        call.cancel()
    return "OK"


def good_call(role: str, model: Model) -> tuple[str, bytes, bool]:
    """A method, a request that nothing is wrong with, and whether its answer is a stream."""
    if role == "prefill":
        return (
            "/griffin.v1.PrefillService/Prefill",
            prefill_request(model.fingerprint, [5, 6, 7], model.decoder.calibration_digest),
            True,
        )
    asked = pb.GenerateRequest(text="hello", stopping=pb.Stopping(max_tokens=2))
    return "/griffin.v1.GenerationService/Generate", asked.SerializeToString(), True


def made(rng: random.Random, method: MethodDescriptor, model: Model) -> bytes:
    """A request: random fields, often with bytes changed, dropped or added."""
    message = message_factory.GetMessageClass(method.input_type)()
    fill(rng, message, share=rng.choice([0.1, 0.5]), odd=rng.choice([0, 0.05, 0.5]))
    for field in ("text", "context", "continuation"):
        if field in message.DESCRIPTOR.fields_by_name and rng.random() < 0.7:
            setattr(message, field, "hello")
    if isinstance(message, prefill_pb2.PrefillRequest) and rng.random() < 0.7:
        message.model_fingerprint = model.fingerprint
        message.calibration_digest = model.decoder.calibration_digest
        message.density = rng.choice([0.25, 0.5, 1.0])
        message.token_ids.append(7)
    return mutated(rng, message.SerializeToString(), times=rng.choice([0, 0, 0, 1, 3]))


def parses(method: MethodDescriptor, data: bytes) -> bool:
    try:
        message_factory.GetMessageClass(method.input_type).FromString(data)
    except DecodeError:
        return False
    return True


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("x-request-id", "x" * 5000),
        ("x-request-id", "a" * 129),
        ("traceparent", "00-zz"),
        ("traceparent", "00-" + "f" * 4000),
        ("tracestate", "=,=,;" * 500),
        ("authorization", "Bearer nobody-asked"),
        ("griffin-bin", b"\xff\x00"),
    ],
)
def test_metadata_does_no_harm(server: Server, key: str, value: str | bytes) -> None:
    for name, method in served(server).items():
        code = server.call(name, b"", method.server_streaming, metadata=((key, value),))
        expected = "INVALID_ARGUMENT" if key == "x-request-id" else None
        assert code == expected or (expected is None and code not in ("UNKNOWN", "INTERNAL"))
