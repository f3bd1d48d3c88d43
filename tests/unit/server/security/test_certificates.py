"""Certificates: who calls by them, and their rotation while streams run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from griffin_client import AsyncGriffinClient, GriffinClient, Tls, Unauthenticated, Unavailable
from griffin_core.model.load import Model
from griffin_server.security.api_keys import line_of
from tests.certificates import Authority, Pair
from tests.servers import Running, eventually, running

ALICE = f"griffin-{'alice':.>43}"

STREAMS = 16


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
        streams = [client.generate("a", max_tokens=100, ignore_eos=True) for _ in range(STREAMS)]
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


def pair_in(folder: Path, source: Pair) -> Pair:
    """The pair as files that can be replaced."""
    pair = Pair(folder / "client.pem", folder / "client.key")
    pair.cert.write_bytes(source.cert.read_bytes())
    pair.key.write_bytes(source.key.read_bytes())
    return pair


def test_a_client_takes_its_new_certificate_and_its_streams_go_on(
    authority: Authority, own: Pair, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    first, second = authority.issue("first", "alice"), authority.issue("second", "bob")
    pair = pair_in(tmp_path, first)
    with (
        running(
            tiny("llama"), tls_cert=own.cert, tls_key=own.key, tls_client_ca=authority.cert
        ) as server,
        client_of(server, authority.cert, pair) as client,
    ):

        def owner() -> str:
            made = client.complete("a", max_tokens=1, keep_session=True)
            return client.get_session(made.started.session_id).owner

        assert owner() == "alice"
        streams = [client.generate("a", max_tokens=200, ignore_eos=True) for _ in range(STREAMS)]
        for stream in streams:
            next(stream)
        pair.cert.write_bytes(second.cert.read_bytes())
        assert owner() == "alice"  # while the files do not fit together
        pair.key.unlink()
        assert owner() == "alice"
        pair.key.write_bytes(second.key.read_bytes())
        assert owner() == "bob"
        for stream in streams:
            assert list(stream)[-1].reason == "max_tokens"  # type: ignore[union-attr]


async def test_the_asynchronous_client_does_too(
    authority: Authority, own: Pair, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    pair = pair_in(tmp_path, authority.issue("first", "alice"))
    with running(
        tiny("llama"), tls_cert=own.cert, tls_key=own.key, tls_client_ca=authority.cert
    ) as server:
        tls = Tls(ca=authority.cert, cert=pair.cert, key=pair.key)
        async with AsyncGriffinClient(server.target, tls=tls, max_retries=0) as client:
            stream = client.generate("a", max_tokens=200, ignore_eos=True)
            await anext(stream)
            pair_in(tmp_path, authority.issue("second", "bob"))
            made = await client.complete("a", max_tokens=1, keep_session=True)
            assert (await client.get_session(made.started.session_id)).owner == "bob"
            events = [event async for event in stream]
            assert events[-1].reason == "max_tokens"  # type: ignore[union-attr]


def test_decode_takes_its_new_certificate_for_prefill_servers(
    authority: Authority, own: Pair, tiny: Callable[[str], Model], tmp_path: Path
) -> None:
    """A handoff that runs goes on, and the next one is with the new name."""
    pair = pair_in(tmp_path, authority.issue("first", "decode-1"))
    model = tiny("llama")
    with (
        running(
            model,
            role="prefill",
            tls_cert=own.cert,
            tls_key=own.key,
            tls_client_ca=authority.cert,
            prefill_peers="decode-1",
        ) as prefill,
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
        assert client.complete("hello", max_tokens=1).finished.usage.generated_tokens == 1
        pair_in(tmp_path, authority.issue("second", "decode-2"))
        with pytest.raises(Unavailable):
            client.complete("hello", max_tokens=1)
        pair_in(tmp_path, authority.issue("third", "decode-1"))

        def served() -> bool:
            try:
                client.complete("hello", max_tokens=1)
            except Unavailable:
                return False
            return True

        eventually(served)
