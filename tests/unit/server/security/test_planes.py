"""The planes: what is served where, who is let in there, and what a server may listen on."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from griffin.v1 import generation_pb2, generation_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from griffin_client import PermissionDenied, Unavailable
from griffin_core.model.load import Model
from griffin_server.security.api_keys import line_of
from griffin_server.settings import Settings
from tests.certificates import Authority, Pair
from tests.servers import Running, free_port, running

FOUR = {"max_tokens": 4, "ignore_eos": True}
KEY = f"griffin-{'alice':.>43}"


@pytest.fixture(scope="module")
def internal(authority: Authority, own: Pair, tiny: Callable[[str], Model]) -> Iterator[Running]:
    """A prefill server that asks for certificates."""
    with running(
        tiny("llama"),
        role="prefill",
        tls_cert=own.cert,
        tls_key=own.key,
        tls_client_ca=authority.cert,
        prefill_peers="decode-1,decode-3",
    ) as server:
        yield server


def prefill(channel: grpc.Channel) -> Any:
    stub = prefill_pb2_grpc.PrefillServiceStub(channel)
    return next(stub.Prefill(prefill_pb2.PrefillRequest(), timeout=10))


def watch(channel: grpc.Channel) -> Any:
    stub = health_pb2_grpc.HealthStub(channel)
    return next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=10))


def check(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)


def reflect(channel: grpc.Channel) -> Any:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    return next(stub.ServerReflectionInfo(requests, timeout=10))


def generate(channel: grpc.Channel) -> Any:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    return stub.GetModelInfo(generation_pb2.GetModelInfoRequest(), timeout=10)


INTERNAL = (prefill, watch, reflect)


def code_of(call: Callable[[grpc.Channel], Any], channel: grpc.Channel) -> str:
    try:
        call(channel)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def credentials(ca: Path, pair: Pair | None) -> grpc.ChannelCredentials:
    if pair is None:
        return grpc.ssl_channel_credentials(ca.read_bytes())
    return grpc.ssl_channel_credentials(
        ca.read_bytes(), pair.key.read_bytes(), pair.cert.read_bytes()
    )


@pytest.mark.parametrize("call", [*INTERNAL, check])
def test_strangers_get_no_connection_to_the_internal_plane(
    call: Callable[[grpc.Channel], Any], internal: Running, authority: Authority, tmp_path: Path
) -> None:
    others = Authority(tmp_path, "others")
    strangers = {
        "no certificate": None,
        "another CA's": others.issue("impostor", "decode-1"),
        "an expired one": authority.issue("ended", "decode-1", ended=True),
    }
    for who, pair in strangers.items():
        with grpc.secure_channel(internal.target, credentials(authority.cert, pair)) as channel:
            assert code_of(call, channel) == "UNAVAILABLE", who
    with grpc.insecure_channel(internal.target) as channel:
        assert code_of(call, channel) == "UNAVAILABLE"


@pytest.mark.parametrize("call", INTERNAL)
def test_those_with_other_names_are_refused_on_it(
    call: Callable[[grpc.Channel], Any], internal: Running, authority: Authority
) -> None:
    before = internal.app.engine.snapshot().result(10)
    for names, code in (
        (("decode-2",), "PERMISSION_DENIED"),
        (("decode-2", "decode-1"), "PERMISSION_DENIED"),  # the first name counts
        ((), "UNAUTHENTICATED"),
    ):
        pair = authority.issue("named", *names)
        with grpc.secure_channel(internal.target, credentials(authority.cert, pair)) as channel:
            assert code_of(call, channel) == code
            assert code_of(check, channel) == "OK"
            assert code_of(generate, channel) == "UNIMPLEMENTED"
    assert internal.app.engine.snapshot().result(10) == before


def test_a_peer_is_served_and_a_stranger_is_not(
    internal: Running, authority: Authority, tiny: Callable[[str], Model]
) -> None:
    def complete(name: str) -> Any:
        pair = authority.issue(name, name)
        with (
            running(
                tiny("llama"),
                role="decode",
                prefill_target=internal.target,
                prefill_ca=authority.cert,
                prefill_cert=pair.cert,
                prefill_key=pair.key,
            ) as decode,
            decode.client() as client,
        ):
            return client.complete("hello", **FOUR)

    assert complete("decode-1").finished.usage.generated_tokens == 4
    with pytest.raises((PermissionDenied, Unavailable)):
        complete("decode-2")


def test_role_all_serves_prefill_only_where_it_is_asked_to(
    tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    model = tiny("llama")
    with (
        running(model) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        assert code_of(prefill, channel) == "UNIMPLEMENTED"
    with (
        running(model, prefill_host=f"unix:{tmp_path}/internal") as both,
        grpc.insecure_channel(both.target) as public,
        grpc.insecure_channel(both.prefill_target) as inside,
    ):
        assert code_of(prefill, public) == "UNIMPLEMENTED"
        assert code_of(generate, inside) == "UNIMPLEMENTED"
        assert code_of(generate, public) == code_of(check, inside) == "OK"
        with (
            running(model, role="decode", prefill_target=both.prefill_target) as decode,
            decode.client() as client,
            both.client() as own,
        ):
            assert client.complete("a", **FOUR).text == own.complete("a", **FOUR).text
    assert not list(tmp_path.iterdir())


# -- the HTTP ports -------------------------------------------------------------------------------


def get(url: str, context: ssl.SSLContext | None = None) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10, context=context) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_with_tls_metrics_have_it_too_and_probes_need_none(
    authority: Authority, own: Pair, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    metrics, health = free_port(), free_port()
    scraper = authority.issue("prometheus", "prometheus")
    impostor = Authority(tmp_path, "others").issue("impostor", "prometheus")
    with running(
        tiny("llama"),
        tls_cert=own.cert,
        tls_key=own.key,
        metrics_client_ca=authority.cert,
        metrics_port=metrics,
        health_port=health,
    ):
        known = ssl.create_default_context(cafile=str(authority.cert))
        known.load_cert_chain(scraper.cert, scraper.key)
        for path in ("metrics", "livez", "readyz"):
            assert get(f"https://localhost:{metrics}/{path}", known) == 200
        nobody = ssl.create_default_context(cafile=str(authority.cert))
        wrong = ssl.create_default_context(cafile=str(authority.cert))
        wrong.load_cert_chain(impostor.cert, impostor.key)
        for context in (nobody, wrong):
            with pytest.raises(OSError, match=r"alert|reset|closed|EOF"):
                get(f"https://localhost:{metrics}/metrics", context)
        with pytest.raises(OSError):  # in plain text the connection just ends
            get(f"http://localhost:{metrics}/metrics")
        for path, code in (("livez", 200), ("readyz", 200), ("healthz", 200), ("metrics", 404)):
            assert get(f"http://localhost:{health}/{path}") == code
        assert get(f"https://localhost:{metrics}/metrics", known) == 200


def test_the_certificate_of_the_metrics_port_is_replaced(
    authority: Authority, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    other = Authority(tmp_path, "second")
    first, second = authority.issue("first", "localhost"), other.issue("second", "localhost")
    pair = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    port = free_port()

    def write(source: Pair) -> None:
        pair.cert.write_bytes(source.cert.read_bytes())
        pair.key.write_bytes(source.key.read_bytes())

    write(first)
    url = f"https://localhost:{port}/readyz"
    with running(tiny("llama"), tls_cert=pair.cert, tls_key=pair.key, metrics_port=port):
        assert get(url, ssl.create_default_context(cafile=str(authority.cert))) == 200
        write(second)
        assert get(url, ssl.create_default_context(cafile=str(other.cert))) == 200
        with pytest.raises(OSError, match="certificate verify failed"):
            get(url, ssl.create_default_context(cafile=str(authority.cert)))


def test_a_scraper_that_does_not_shake_hands_holds_up_nobody(
    authority: Authority, own: Pair, tiny: Callable[[str], Model]
) -> None:
    import socket  # noqa: PLC0415

    port = free_port()
    with running(tiny("llama"), tls_cert=own.cert, tls_key=own.key, metrics_port=port):
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        known = ssl.create_default_context(cafile=str(authority.cert))
        assert get(f"https://localhost:{port}/metrics", known) == 200
        for connection in silent:
            connection.close()


# -- what a server may listen on -------------------------------------------------------------------


def settings(**given: Any) -> Settings:
    return Settings(**given)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_nobody_listens_to_others_by_accident(host: str, own: Pair, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line_of(KEY, "alice"))
    keys = {"api_keys": tmp_path / "keys"}
    tls = {"tls_cert": own.cert, "tls_key": own.key}
    for given in ({}, keys, tls):
        with pytest.raises(ValueError, match="which others can reach"):
            settings(host=host, **given)
    settings(host=host, **keys, **tls)
    settings(host=host, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"])
def test_this_machine_needs_neither(host: str) -> None:
    settings(host=host)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tls_cert": __file__}, "tls_cert, tls_key"),
        ({"tls_cert": "/no/such/file", "tls_key": __file__}, "tls_cert"),
        ({"tls_client_ca": __file__}, "tls_client_ca"),
        ({"jwt_keys": "a", "jwt_issuer": "i"}, "jwt_keys, jwt_audience"),
        ({"prefill_key": __file__}, "prefill_cert, prefill_key"),
        ({"host": "unix:/tmp/s", "tls_cert": __file__, "tls_key": __file__}, "Unix socket"),
    ],
)
def test_half_a_setting_is_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        settings(**given)


@pytest.mark.parametrize("role", ["prefill", "all"])
def test_the_internal_plane_needs_certificates_where_others_reach_it(
    role: str, authority: Authority, own: Pair, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(line_of(KEY, "alice"))
    name = "host" if role == "prefill" else "prefill_host"
    keys = {"api_keys": tmp_path / "keys"} if role == "all" else {}
    tls = {"tls_cert": own.cert, "tls_key": own.key}
    ca = {"tls_client_ca": authority.cert}
    where = {"role": role, name: "0.0.0.0"}
    for given in ({}, tls, keys, {**tls, **keys}):
        with pytest.raises(ValueError, match=f"{name}: got '0.0.0.0', which others can reach"):
            settings(**where, **given)
    with pytest.raises(ValueError, match="prefill_peers: got none"):
        settings(**where, **tls, **ca)
    settings(**where, **tls, **ca, prefill_peers="decode-1")
    settings(**where, insecure=True)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"role": "prefill", "api_keys": __file__}, "api_keys, jwt_keys: .*certificates"),
        ({"role": "prefill", "prefill_host": "::1"}, "prefill_host: got '::1' with role"),
        (
            {"role": "decode", "prefill_target": "a:1", "prefill_host": "::1"},
            "prefill_host: got '::1' with role",
        ),
        ({"prefill_host": "a b"}, "prefill_host"),
        ({"metrics_client_ca": __file__}, "metrics_client_ca: got a file without tls_cert"),
    ],
)
def test_a_plane_that_makes_no_sense_is_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        settings(**given)
