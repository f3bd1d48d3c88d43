"""Who may call: keys, tokens and certificates, at each RPC of each service."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner

from griffin.v1 import generation_pb2, generation_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from griffin_client import (
    GriffinClient,
    InvalidArgument,
    PermissionDenied,
    Tls,
    Unauthenticated,
    Unavailable,
)
from griffin_core.model.load import Model
from griffin_server.commands import app as griffin
from griffin_server.security.api_keys import line_of
from griffin_server.security.errors import BadSecurityFile
from griffin_server.settings import Settings
from tests.certificates import Authority, Pair
from tests.servers import Running, eventually, running

ISSUER, AUDIENCE = "https://issuer.example", "griffin"
ALICE, OPERATOR, DECODE = (f"griffin-{name:.>43}" for name in ("alice", "oncall", "decode"))


def metadata(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


def calls() -> dict[str, Callable[[grpc.Channel, Any], Any]]:
    """Each RPC of each service but Check, as a call with metadata that ends at its first answer."""
    found: dict[str, Callable[[grpc.Channel, Any], Any]] = {}
    for module, stubs in (
        (generation_pb2, generation_pb2_grpc),
        (prefill_pb2, prefill_pb2_grpc),
    ):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                streams = method.server_streaming
                request = getattr(module, method.input_type.name)()
                stub = getattr(stubs, f"{service.name}Stub")

                def call(
                    channel: grpc.Channel,
                    sent: Any,
                    stub: Any = stub,
                    name: str = method.name,
                    request: Any = request,
                    streams: bool = streams,
                ) -> Any:
                    made = getattr(stub(channel), name)(request, metadata=sent, timeout=10)
                    return next(made) if streams else made

                found[f"{service.name}.{method.name}"] = call

    def watch(channel: grpc.Channel, sent: Any) -> Any:
        request = health_pb2.HealthCheckRequest()
        return next(health_pb2_grpc.HealthStub(channel).Watch(request, metadata=sent, timeout=10))

    def reflect(channel: grpc.Channel, sent: Any) -> Any:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        return next(stub.ServerReflectionInfo(requests, metadata=sent, timeout=10))

    return {**found, "Health.Watch": watch, "Reflection": reflect}


CALLS = calls()
OPEN_TO_CALLERS = ("GenerationService.GetModelInfo", "Health.Watch", "Reflection")
"""Those that succeed with an empty request."""


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def signer() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def key_set(key: rsa.RSAPrivateKey, key_id: str = "k1") -> str:
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key()))
    return json.dumps({"keys": [{**public, "kid": key_id, "alg": "RS256"}]})


def token(key: rsa.RSAPrivateKey, key_id: str = "k1", **claims: Any) -> str:
    whole = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "alice",
        "exp": time.time() + 60,
        **claims,
    }
    kept = {name: value for name, value in whole.items() if value is not None}
    return jwt.encode(kept, key, algorithm="RS256", headers={"kid": key_id})


@pytest.fixture(scope="module")
def guarded(
    tiny: Callable[[str], Model],
    tmp_path_factory: pytest.TempPathFactory,
    signer: rsa.RSAPrivateKey,
) -> Iterator[Running]:
    """A server in role all that asks for keys or tokens."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(
        "# names, hashes, groups\n\n"
        f"{line_of(ALICE, 'alice')}\n{line_of(OPERATOR, 'oncall', ('operator',))} # at night\n"
        f"{line_of(DECODE, 'decode-1')}\n"
    )
    (folder / "jwks.json").write_text(key_set(signer))
    with running(
        tiny("llama"),
        api_keys=folder / "keys",
        jwt_keys=str(folder / "jwks.json"),
        jwt_issuer=ISSUER,
        jwt_audience=AUDIENCE,
        prefill_peers="decode-1",
    ) as server:
        yield server


@pytest.fixture(scope="module")
def strangers(signer: rsa.RSAPrivateKey) -> dict[str, Any]:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    flipped = ALICE[:-1] + ("A" if ALICE[-1] != "A" else "B")
    return {
        "nothing": (),
        "no scheme": (("authorization", ALICE),),
        "another scheme": (("authorization", f"Basic {ALICE}"),),
        "an empty key": metadata(""),
        "a key off by a byte": metadata(flipped),
        "the hash in place of the key": metadata(hashlib.sha256(ALICE.encode()).hexdigest()),
        "no token": metadata("a.b.c"),
        "an expired token": metadata(token(signer, exp=time.time() - 60)),
        "a token from the future": metadata(token(signer, nbf=time.time() + 3600)),
        "a token without an end": metadata(token(signer, exp=None)),
        "a token for others": metadata(token(signer, aud="another")),
        "a token of others": metadata(token(signer, iss="https://another.example")),
        "a token of nobody": metadata(token(signer, sub=None)),
        "a token with a strange name": metadata(token(signer, sub="a b\n")),
        "another's signature": metadata(token(other)),
        "an unknown key": metadata(token(signer, key_id="k2")),
        "an unsigned token": metadata(
            jwt.encode({"sub": "alice", "aud": AUDIENCE, "iss": ISSUER}, None, algorithm="none")
        ),
        "a token signed by the public key": metadata(
            jwt.encode({"sub": "alice"}, "x" * 64, algorithm="HS256", headers={"kid": "k1"})
        ),
    }


@pytest.mark.parametrize("rpc", sorted(CALLS))
def test_strangers_are_refused_everywhere(
    rpc: str, guarded: Running, strangers: dict[str, Any]
) -> None:
    before = guarded.app.engine.snapshot().result(10)
    with grpc.insecure_channel(guarded.target) as channel:
        codes = {
            who: code_of(lambda sent=sent: CALLS[rpc](channel, sent))  # type: ignore[misc]
            for who, sent in strangers.items()
        }
    assert codes == dict.fromkeys(strangers, grpc.StatusCode.UNAUTHENTICATED)
    assert guarded.app.engine.snapshot().result(10) == before


@pytest.mark.parametrize("rpc", sorted(CALLS))
def test_callers_are_let_in(rpc: str, guarded: Running, signer: rsa.RSAPrivateKey) -> None:
    peer = rpc.startswith("PrefillService")
    with grpc.insecure_channel(guarded.target) as channel:
        for secret in (ALICE, token(signer), token(signer, exp=time.time() - 10)):  # the leeway
            code = code_of(lambda secret=secret: CALLS[rpc](channel, metadata(secret)))  # type: ignore[misc]
            if peer:
                assert code is grpc.StatusCode.PERMISSION_DENIED
            elif rpc in OPEN_TO_CALLERS:
                assert code is grpc.StatusCode.OK
            else:  # an empty request is looked at, and refused for what it is
                assert code in (
                    grpc.StatusCode.OK,
                    grpc.StatusCode.INVALID_ARGUMENT,
                    grpc.StatusCode.NOT_FOUND,
                )
        if peer:
            code = code_of(lambda: CALLS[rpc](channel, metadata(DECODE)))
            assert code not in (
                grpc.StatusCode.PERMISSION_DENIED,
                grpc.StatusCode.UNAUTHENTICATED,
            )


def test_probes_need_no_identity(guarded: Running) -> None:
    with grpc.insecure_channel(guarded.target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_nothing_is_parsed_for_strangers(guarded: Running) -> None:
    with grpc.insecure_channel(guarded.target) as channel:
        call = channel.unary_unary("/griffin.v1.GenerationService/CloseSession")
        broken = b"\xff" * 10
        assert code_of(lambda: call(broken)) is grpc.StatusCode.UNAUTHENTICATED
        sent = metadata(ALICE)
        assert code_of(lambda: call(broken, metadata=sent)) is grpc.StatusCode.INVALID_ARGUMENT


def test_the_client_sends_its_key(
    guarded: Running, signer: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GriffinClient(guarded.target) as client, pytest.raises(Unauthenticated) as caught:
        client.model_info()
    assert caught.value.reason == "UNAUTHENTICATED"
    with GriffinClient(guarded.target, api_key=ALICE) as client:
        client.model_info()
    with GriffinClient(guarded.target, api_key=lambda: token(signer)) as client:
        client.model_info()
    monkeypatch.setenv("GRIFFIN_API_KEY", ALICE)
    with GriffinClient(guarded.target) as client:
        client.model_info()


def test_the_client_sends_no_key_in_plain_text() -> None:
    for target in ("example.com:50051", "10.0.0.1:1", "dns:///example.com:1"):
        with pytest.raises(InvalidArgument, match="plain text") as caught:
            GriffinClient(target, api_key=ALICE)
        assert ALICE not in str(caught.value)


def test_a_key_whose_line_is_gone_is_refused(
    tiny: Callable[[str], Model], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At once, and others are not disturbed; a file that cannot be read changes nothing."""
    keys = tmp_path / "keys"
    keys.write_text(f"{line_of(ALICE, 'alice')}\n{line_of(OPERATOR, 'oncall')}\n")
    with (
        running(tiny("llama"), api_keys=keys) as server,
        GriffinClient(server.target, api_key=ALICE, max_retries=0) as alice,
        GriffinClient(server.target, api_key=OPERATOR, max_retries=0) as other,
    ):
        alice.model_info()
        keys.write_text(f"{line_of(OPERATOR, 'oncall')}\n")
        with pytest.raises(Unauthenticated):
            alice.model_info()
        other.model_info()
        capfd.readouterr()
        keys.write_text("oncall not-a-hash\n")
        for _ in range(3):
            other.model_info()
        assert capfd.readouterr().out.count("line 1: after the name") == 1  # said once
        keys.unlink()
        other.model_info()
        keys.write_text(f"{line_of(ALICE, 'alice')}\n")
        alice.model_info()
        with pytest.raises(Unauthenticated):
            other.model_info()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("alice", "line 1: after the name"),
        (f"{line_of(ALICE, 'alice')}\nbob 12", "line 2: after the name"),
        (f"a,b {'0' * 64}", "line 1: a name"),
    ],
)
def test_a_file_of_keys_that_is_malformed_ends_the_start(
    text: str, why: str, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(text)
    with (
        pytest.raises(BadSecurityFile, match=why) as caught,
        running(tiny("llama"), api_keys=tmp_path / "keys"),
    ):
        pass
    assert ALICE not in str(caught.value)


def test_secret_keys_are_no_keys_of_tokens(tiny: Callable[[str], Model], tmp_path: Path) -> None:
    (tmp_path / "jwks").write_text(json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}))
    with (
        pytest.raises(BadSecurityFile, match="oct"),
        running(tiny("llama"), jwt_keys=str(tmp_path / "jwks"), jwt_issuer="i", jwt_audience="a"),
    ):
        pass


def test_keys_of_tokens_come_from_a_url(
    tiny: Callable[[str], Model], signer: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are fetched again for a key that is unknown, but not for each call with one."""
    from griffin_server.security import tokens  # noqa: PLC0415

    monkeypatch.setattr(tokens, "LEAST_INTERVAL_S", 0.2)
    served, fetched = [key_set(signer)], []

    def fetch(self: Any) -> Any:
        fetched.append(time.monotonic())
        if not served:
            raise jwt.PyJWKClientError("gone")
        return json.loads(served[0])

    monkeypatch.setattr(jwt.PyJWKClient, "fetch_data", fetch)
    with running(
        tiny("llama"),
        jwt_keys="https://issuer.example/jwks",
        jwt_issuer=ISSUER,
        jwt_audience=AUDIENCE,
    ) as server:

        def calls(secret: str) -> None:
            with GriffinClient(server.target, api_key=secret, max_retries=0) as client:
                client.model_info()

        for _ in range(3):
            calls(token(signer))
        assert len(fetched) == 1
        for _ in range(3):
            with pytest.raises(Unauthenticated):
                calls(token(signer, key_id="k2"))
        assert len(fetched) <= 3
        served[0] = key_set(signer, "k2")
        eventually(lambda: time.monotonic() - fetched[-1] > 0.2)
        calls(token(signer, key_id="k2"))
        served.clear()
        calls(token(signer, key_id="k2"))


def test_a_key_and_its_line_are_made(tiny: Callable[[str], Model], tmp_path: Path) -> None:
    made = CliRunner().invoke(griffin, ["key", "alice", "--group", "operator"])
    assert made.exit_code == 0
    (tmp_path / "keys").write_text(made.stdout)
    with (
        running(tiny("llama"), api_keys=tmp_path / "keys") as server,
        GriffinClient(server.target, api_key=made.stderr.strip()) as client,
    ):
        client.model_info()
    refused = CliRunner().invoke(griffin, ["key", "a b"])
    assert refused.exit_code == 2 and "allowed: 1 to 128" in refused.stderr


# -- certificates ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def own(authority: Authority) -> Pair:
    return authority.issue("server", "localhost", "127.0.0.1")


def client_of(server: Running, ca: Path, pair: Pair | None = None, **options: Any) -> GriffinClient:
    tls = Tls(ca=ca, cert=pair.cert if pair else None, key=pair.key if pair else None)
    return GriffinClient(server.target, tls=tls, max_retries=0, timeout=10, **options)


def test_certificates_say_who_calls(
    authority: Authority, own: Pair, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    alice = authority.issue("alice", "spiffe://example.com/alice", "alice.example.com")
    nameless = authority.issue("nameless")
    ended = authority.issue("ended", "alice.example.com", ended=True)
    others = Authority(tmp_path, "others")
    impostor = others.issue("impostor", "alice.example.com")
    with running(
        tiny("llama"), tls_cert=own.cert, tls_key=own.key, tls_client_ca=authority.cert
    ) as server:
        with client_of(server, authority.cert, alice) as client:
            made = client.complete("a", max_tokens=1, keep_session=True)
            assert client.get_session(made.started.session_id).owner == "spiffe://example.com/alice"
        for pair in (None, ended, impostor):
            with client_of(server, authority.cert, pair) as client, pytest.raises(Unavailable):
                client.model_info()
        unnamed = pytest.raises(Unauthenticated, match="subject alternative name")
        with client_of(server, authority.cert, nameless) as client, unnamed:
            client.model_info()
        with client_of(server, others.cert, alice) as client, pytest.raises(Unavailable):
            client.model_info()  # the client does not know the server's authority
        plain = GriffinClient(server.target, max_retries=0, timeout=10)
        with plain, pytest.raises(Unavailable):
            plain.model_info()


def test_a_server_of_another_name_is_not_talked_to(
    authority: Authority, tiny: Callable[[str], Model]
) -> None:
    wrong = authority.issue("wrong", "another.example.com")
    with (
        running(tiny("llama"), tls_cert=wrong.cert, tls_key=wrong.key) as server,
        client_of(server, authority.cert) as client,
        pytest.raises(Unavailable),
    ):
        client.model_info()


def test_keys_travel_in_tls(
    authority: Authority, own: Pair, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(line_of(ALICE, "alice"))
    with running(
        tiny("llama"), tls_cert=own.cert, tls_key=own.key, api_keys=tmp_path / "keys"
    ) as server:
        with client_of(server, authority.cert, api_key=ALICE) as client:
            client.model_info()
        with client_of(server, authority.cert) as client, pytest.raises(Unauthenticated):
            client.model_info()


def test_certificates_are_replaced_while_streams_run(
    authority: Authority, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    """No stream fails, new connections get the new certificate, and files that do not fit together
    for a moment change nothing."""
    folder = Authority(tmp_path, "second")
    first, second = (ca.issue(f"pair{n}", "127.0.0.1") for n, ca in enumerate((authority, folder)))
    pair = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.cert.write_bytes(first.cert.read_bytes())
    pair.key.write_bytes(first.key.read_bytes())
    with (
        running(tiny("llama"), tls_cert=pair.cert, tls_key=pair.key) as server,
        client_of(server, authority.cert) as client,
    ):
        streams = [client.generate("a", max_tokens=100, ignore_eos=True) for _ in range(4)]
        for stream in streams:
            next(stream)
        pair.cert.write_bytes(second.cert.read_bytes())
        with client_of(server, authority.cert) as early:
            early.model_info()
        pair.key.write_bytes(second.key.read_bytes())
        with client_of(server, folder.cert) as late:
            late.model_info()
        with client_of(server, authority.cert) as early, pytest.raises(Unavailable):
            early.model_info()
        for stream in streams:
            assert list(stream)[-1].reason == "max_tokens"  # type: ignore[union-attr]


def test_prefill_lets_in_only_its_peers(
    authority: Authority, own: Pair, tiny: Callable[[str], Model]
) -> None:
    peer = authority.issue("peer", "decode-1")
    stranger = authority.issue("stranger", "decode-2")
    model = tiny("llama")
    with running(
        model,
        role="prefill",
        tls_cert=own.cert,
        tls_key=own.key,
        tls_client_ca=authority.cert,
        prefill_peers="decode-1,decode-3",
    ) as prefill:

        def complete(pair: Pair) -> Any:
            with (
                running(
                    model,
                    role="decode",
                    prefill_target=prefill.target,
                    prefill_ca=authority.cert,
                    prefill_cert=pair.cert,
                    prefill_key=pair.key,
                ) as decode,
                decode.client() as client,
            ):
                return client.complete("hello", max_tokens=4, ignore_eos=True)

        assert complete(peer).finished.usage.generated_tokens == 4
        with pytest.raises((PermissionDenied, Unavailable)):
            complete(stranger)


# -- what a server may listen on -------------------------------------------------------------------


def settings(**given: Any) -> Settings:
    return Settings(**given)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_nobody_listens_to_others_by_accident(host: str, own: Pair, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line_of(ALICE, "alice"))
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
