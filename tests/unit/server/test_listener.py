"""A server that listens: before it has a model, on Unix sockets, on IPv6, and describing itself."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_client import AsyncGriffinClient, Unavailable
from griffin_core.model.load import Model
from griffin_server.address import ListenError
from griffin_server.listener import GENERATION, Listener
from griffin_server.rpc.reflection import SERVICES, V1
from griffin_server.settings import Settings
from tests.servers import free_port, running
from tests.unit.server.test_address import needs_ipv6

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FOUR = {"max_tokens": 4, "ignore_eos": True}


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


async def test_before_there_is_a_model_the_server_is_live_and_not_ready() -> None:
    metrics = free_port()
    listener = Listener(Settings(port=0, metrics_port=metrics))
    await listener.start()
    async with (
        grpc.aio.insecure_channel(str(listener.address)) as channel,
        AsyncGriffinClient(channel=channel, max_retries=0) as client,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", GENERATION):
            request = health_pb2.HealthCheckRequest(service=service)
            assert (await health.Check(request)).status == NOT_SERVING
        with pytest.raises(Unavailable, match="loading") as refused:
            await client.complete("a")
        assert refused.value.reason == "NOT_READY"
        with pytest.raises(Unavailable):
            await client.model_info()
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await channel.unary_unary(f"/{GENERATION}/Nope")(b"")
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
    for path, code in (("livez", 200), ("readyz", 503), ("healthz", 503), ("metrics", 200)):
        assert status(f"http://127.0.0.1:{metrics}/{path}") == code
    handled = listener.metrics.registry.get_sample_value(
        "grpc_server_handled_total",
        {
            "grpc_type": "server_stream",
            "grpc_service": GENERATION,
            "grpc_method": "Generate",
            "grpc_code": "UNAVAILABLE",
        },
    )
    assert handled == 1
    await listener.close()


def test_a_server_that_serves_is_live_and_ready(tiny: Callable[[str], Model]) -> None:
    port = free_port()
    with running(tiny("llama"), metrics_port=port):
        for path in ("livez", "readyz", "healthz"):
            assert status(f"http://127.0.0.1:{port}/{path}") == 200


@pytest.mark.parametrize("spelling", ["unix:{}", "unix://{}"])
def test_a_unix_socket_serves(spelling: str, tiny: Callable[[str], Model], tmp_path: Path) -> None:
    path = tmp_path / "griffin.sock"
    with running(tiny("llama"), host=spelling.format(path)) as server, server.client() as client:
        assert server.target == f"unix:{path}"
        assert client.complete("a", **FOUR).finished.usage.generated_tokens == 4
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with (
            pytest.raises(ListenError, match=r"port: cannot listen on unix:.*in use"),
            running(tiny("llama"), host=f"unix:{path}"),
        ):
            pass
        assert client.model_info().family == "llama"  # the second left the first alone
    assert not path.exists()


def test_a_server_that_ends_leaves_the_socket_of_its_successor(
    tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    path = tmp_path / "griffin.sock"
    with ExitStack() as second:
        with running(tiny("llama"), host=f"unix:{path}"):
            path.unlink()
            server = second.enter_context(running(tiny("llama"), host=f"unix:{path}"))
        assert list(tmp_path.iterdir()) == [path]
        with server.client() as client:
            assert client.complete("a", **FOUR).finished.usage.generated_tokens == 4
    assert list(tmp_path.iterdir()) == []


def test_beside_a_unix_socket_metrics_are_on_this_machine(
    tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    port = free_port()
    with running(tiny("llama"), host=f"unix:{tmp_path}/s", metrics_port=port):
        assert status(f"http://localhost:{port}/readyz") == 200


def test_prefill_is_called_by_a_unix_socket(tiny: Callable[[str], Model], tmp_path: Path) -> None:
    model = tiny("llama")
    with (
        running(model, role="prefill", host=f"unix:{tmp_path}/prefill") as prefill,
        running(model, role="decode", prefill_target=prefill.target) as decode,
        decode.client() as client,
    ):
        assert client.complete("hello", **FOUR).finished.usage.generated_tokens == 4


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]", "::", "0.0.0.0"])
def test_ipv6_serves_with_metrics(host: str, tiny: Callable[[str], Model]) -> None:
    port = free_port()
    with running(tiny("llama"), host=host, metrics_port=port, insecure=True) as server:
        grpc_port = server.target.rpartition(":")[2]
        alone = "::1" in host
        for reached in ("[::1]",) if alone else ("[::1]", "127.0.0.1"):
            assert status(f"http://{reached}:{port}/readyz") == 200
            with grpc.insecure_channel(f"{reached}:{grpc_port}") as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                assert stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10).family == "llama"
        if alone:
            assert server.target.startswith("[::1]:")


@needs_ipv6
def test_prefill_is_called_by_ipv6(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    with (
        running(model, role="prefill", host="::1") as prefill,
        running(model, role="decode", prefill_target=prefill.target) as decode,
        decode.client() as client,
    ):
        assert client.complete("hello", **FOUR).finished.usage.generated_tokens == 4


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("192.0.2.1", "192.0.2.1:50999 (Cannot assign requested address)"),
        ("no-such-name.invalid", ""),
        ("unix:/no/such/directory/griffin.sock", "No such file or directory"),
        ("unix:/proc/griffin.sock", ""),
        ("unix:/etc/hostname", "no socket"),
    ],
)
async def test_an_address_that_cannot_be_had_is_named(host: str, why: str) -> None:
    listener = Listener(Settings(host=host, port=50999, insecure=True))
    with pytest.raises(ListenError) as caught:
        await listener.start()
    assert str(caught.value).startswith(f"host, port: cannot listen on {host}")
    assert why in str(caught.value)
    await listener.close()


async def test_a_metrics_port_that_is_taken_leaves_no_socket(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = tmp_path / "griffin.sock"
        settings = Settings(host=f"unix:{path}", metrics_host="127.0.0.1", metrics_port=port)
        listener = Listener(settings)
        with pytest.raises(ListenError, match="metrics_port: cannot listen on"):
            await listener.start()
        await listener.close()
    assert not path.exists()


BOGUS = "http://127.0.0.1:1"
"""A proxy that nobody is at."""


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_a_proxy_of_the_environment_is_for_others(
    variable: str,
    where: str,
    tiny: Callable[[str], Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, BOGUS)
    model = tiny("llama")
    host = {"host": f"unix:{tmp_path}/prefill"} if where == "unix" else {}
    with (
        running(model, role="prefill", **host) as prefill,
        running(model, role="decode", prefill_target=prefill.target) as decode,
        decode.client() as client,
    ):
        assert client.complete("hello", **FOUR).finished.usage.generated_tokens == 4
        # What gRPC does of its own, so that this test would see it.
        with grpc.insecure_channel(decode.target) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("service", SERVICES)
def test_a_server_describes_itself_in_both_versions(
    service: str, tiny: Callable[[str], Model]
) -> None:
    """Raw calls: each version's bytes under its own name, and its own description."""
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=GENERATION),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=service),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Name"),
    ]
    with running(tiny("llama")) as server, grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream(f"/{service}/ServerReflectionInfo")
        answers = [
            reflection_pb2.ServerReflectionResponse.FromString(data)
            for data in call(iter(request.SerializeToString() for request in requests), timeout=30)
        ]
    listed, ours, itself, unknown = answers
    assert {service, GENERATION} <= {one.name for one in listed.list_services_response.service}
    assert pb.DESCRIPTOR.serialized_pb in ours.file_descriptor_response.file_descriptor_proto
    assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    # What a tool makes of it: a pool of its own, in which the method's types are of this version.
    pool = descriptor_pool.DescriptorPool()
    for data in itself.file_descriptor_response.file_descriptor_proto:
        pool.AddSerializedFile(data)
    method = pool.FindServiceByName(service).methods_by_name["ServerReflectionInfo"]
    package = service.removesuffix(".ServerReflection")
    assert method.input_type.full_name == f"{package}.ServerReflectionRequest"
    assert method.output_type.full_name == f"{package}.ServerReflectionResponse"
    assert method.client_streaming and method.server_streaming


def test_reflections_versions_differ_in_their_names_alone() -> None:
    """github.com/grpc/grpc-proto: the files are the same but for the package."""
    v1 = descriptor_pb2.FileDescriptorProto()
    descriptor_pool.Default().FindFileByName("grpc/reflection/v1/reflection.proto").CopyToProto(v1)
    alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    assert v1.package == V1
    assert [message.name for message in v1.message_type] == [m.name for m in alpha.message_type]
    for mine, theirs in zip(v1.message_type, alpha.message_type, strict=True):
        assert [(f.name, f.number, f.type, f.label) for f in mine.field] == [
            (f.name, f.number, f.type, f.label) for f in theirs.field
        ]


def test_what_listens_first_brings_no_torch() -> None:
    """Or nobody would be answered for seconds."""
    code = (
        "import sys, griffin_server.commands.serve, griffin_server.lifecycle; "
        "print({'torch', 'transformers', 'numpy', 'numba'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
