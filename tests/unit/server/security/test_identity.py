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

from griffin.v1 import generation_pb2, generation_pb2_grpc
from griffin_client import (
    GriffinClient,
    InvalidArgument,
    Unauthenticated,
)
from griffin_core.model.load import Model
from griffin_server.commands import app as griffin
from griffin_server.security.api_keys import line_of
from griffin_server.security.errors import BadSecurityFile
from tests.servers import Running, eventually, running

ISSUER, AUDIENCE = "https://issuer.example", "griffin"
ALICE, OPERATOR = (f"griffin-{name:.>43}" for name in ("alice", "oncall"))


def metadata(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


def calls() -> dict[str, Callable[[grpc.Channel, Any], Any]]:
    """Each public RPC but Check, as a call with metadata that ends at its first answer."""
    found: dict[str, Callable[[grpc.Channel, Any], Any]] = {}
    service = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
    for method in service.methods:

        def call(channel: grpc.Channel, sent: Any, method: Any = method) -> Any:
            request = getattr(generation_pb2, method.input_type.name)()
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            made = getattr(stub, method.name)(request, metadata=sent, timeout=10)
            return next(made) if method.server_streaming else made

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
    )
    (folder / "jwks.json").write_text(key_set(signer))
    with running(
        tiny("llama"),
        api_keys=folder / "keys",
        jwt_keys=str(folder / "jwks.json"),
        jwt_issuer=ISSUER,
        jwt_audience=AUDIENCE,
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
    with grpc.insecure_channel(guarded.target) as channel:
        for secret in (ALICE, token(signer), token(signer, exp=time.time() - 10)):  # the leeway
            code = code_of(lambda secret=secret: CALLS[rpc](channel, metadata(secret)))  # type: ignore[misc]
            if rpc in OPEN_TO_CALLERS:
                assert code is grpc.StatusCode.OK
            else:  # an empty request is looked at, and refused for what it is
                assert code in (
                    grpc.StatusCode.OK,
                    grpc.StatusCode.INVALID_ARGUMENT,
                    grpc.StatusCode.NOT_FOUND,
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
