"""Addresses: what is read, what it is written as, and what is listened on."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from griffin_server.address import (
    MOST_PATH_BYTES,
    TcpAddress,
    UnixAddress,
    address_of,
    check_target,
    listen,
    parse_host,
)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("host", "written"),
    [
        ("127.0.0.1", "127.0.0.1:7"),
        ("0.0.0.0", "0.0.0.0:7"),
        ("::1", "[::1]:7"),
        ("[::1]", "[::1]:7"),
        ("::", "[::]:7"),
        ("[2001:db8::5]", "[2001:db8::5]:7"),
        ("fe80::1%eth0", "[fe80::1%eth0]:7"),
        ("::ffff:10.0.0.1", "[::ffff:10.0.0.1]:7"),
        ("localhost", "localhost:7"),
        ("griffin-0.griffin.default.svc.cluster.local", None),
        ("host_with_underscore", "host_with_underscore:7"),
        ("unix:/run/griffin.sock", "unix:/run/griffin.sock"),
        ("unix:///run/griffin.sock", "unix:/run/griffin.sock"),
        ("unix:griffin.sock", "unix:griffin.sock"),
    ],
)
def test_an_address_is_written_as_grpc_writes_it(host: str, written: str | None) -> None:
    assert str(parse_host(host, 7)) == (written or f"{host}:7")


@pytest.mark.parametrize(
    "host",
    [
        "",
        "127.0.0.1:50051",
        "[::1]:50051",
        "localhost:50051",
        "[127.0.0.1]",
        "[localhost]",
        "[::1",
        "::1]",
        "1.2.3",
        "999.1.1.1",
        "1::2::3",
        "http://localhost",
        "tcp://10.0.0.1",
        "dns:///localhost",
        "a b",
        "-a",
        "a..b",
        "*",
        "x" * 254,
        "/run/griffin.sock",
        "unix:",
        "unix://run/griffin.sock",
        "unix:/" + "x" * MOST_PATH_BYTES,
        "unix:a\0b",
    ],
)
def test_what_is_no_address_is_refused_with_what_is(host: str) -> None:
    with pytest.raises(ValueError, match="allowed: "):
        parse_host(host, 7)


@pytest.mark.parametrize(
    "target",
    [
        "prefill:50052",
        "10.0.0.1:50052",
        "[::1]:50052",
        "[fe80::1%eth0]:50052",
        "dns:///prefill:50052",
        "dns:prefill",
        "ipv4:10.0.0.1:50052,10.0.0.2:50052",
        "ipv6:[::1]:50052",
        "unix:/run/prefill.sock",
        "unix-abstract:prefill",
        "xds:///prefill",
    ],
)
def test_a_target_is_taken_as_it_is(target: str) -> None:
    assert check_target(target) == target


@pytest.mark.parametrize(
    "target",
    [
        "prefill",
        "prefill:",
        ":50052",
        "prefill:0",
        "prefill:70000",
        "prefill:http",
        "prefill:٣",
        "::1:50052",
        "[prefill]:50052",
        "http://prefill:50052",
        "tcp://10.0.0.1:50052",
        "grpc://prefill:50052",
        "dns:",
        "unix:",
        "pre fill:50052",
    ],
)
def test_what_is_no_target_is_refused_with_what_is(target: str) -> None:
    with pytest.raises(ValueError, match="allowed: "):
        check_target(target)


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_one_ip_address_is_one_socket(host: str) -> None:
    (listening,) = listen(TcpAddress(host=host, port=0))
    with listening:
        where = address_of(listening)
        assert where.host == host and where.port > 0
        with pytest.raises(OSError) as caught:
            listen(where)
        assert caught.value.errno == errno.EADDRINUSE


@needs_ipv6
@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::"])
def test_everywhere_is_ipv4_and_ipv6(everywhere: str) -> None:
    (listening,) = listen(TcpAddress(host=everywhere, port=0))
    with listening:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, address_of(listening).port), 5).close()


@needs_ipv6
def test_a_name_is_all_of_its_addresses_on_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    names_both(monkeypatch)
    sockets = listen(TcpAddress(host="both", port=0))
    (four, six) = (address_of(one) for one in sockets)
    assert (four.host, six.host) == ("127.0.0.1", "::1") and four.port == six.port
    sockets[1].close()
    # Taken on one of them is taken: half a server would be reached by half of its clients.
    with pytest.raises(OSError) as caught:
        listen(TcpAddress(host="both", port=four.port))
    assert caught.value.errno == errno.EADDRINUSE
    sockets[0].close()


@pytest.mark.parametrize("missing", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_an_address_that_the_machine_has_not_is_left_out(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names_both(monkeypatch)
    create = socket.create_server

    def without_ipv6(address: tuple[str, int], **options: object) -> socket.socket:
        if options["family"] == socket.AF_INET6:
            raise OSError(missing, os.strerror(missing))
        return create(address, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "create_server", without_ipv6)
    (listening,) = listen(TcpAddress(host="both", port=0))
    listening.close()
    with pytest.raises(OSError) as caught:
        listen(TcpAddress(host="::1", port=0))
    assert caught.value.errno == missing


def names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the name "both" stand for 127.0.0.1 and ::1."""
    look_up = socket.getaddrinfo

    def both(host: str, *arguments: object, **options: object) -> list[object]:
        hosts = ["127.0.0.1", "::1"] if host == "both" else [host]
        return [found for one in hosts for found in look_up(one, *arguments, **options)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", both)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(OSError):
        listen(TcpAddress(host="no-such-name.invalid", port=0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "griffin.sock"


def test_a_socket_whose_server_has_gone_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()
    assert path.is_socket()
    UnixAddress(path=str(path)).claim()
    assert not path.exists()


def test_a_socket_somebody_listens_on_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        with pytest.raises(OSError) as caught:
            UnixAddress(path=str(path)).claim()
        assert caught.value.errno == errno.EADDRINUSE
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))


def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        UnixAddress(path=str(path)).claim()
    assert path.read_text() == "precious"


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        UnixAddress(path=str(tmp_path / "none" / "griffin.sock")).claim()


def test_a_socket_is_for_its_owner_and_group(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        UnixAddress(path=str(path)).open_to_group()
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


@pytest.mark.parametrize("whose", ["own", "other", "gone"])
def test_only_a_socket_of_its_own_goes_with_a_server(path: Path, whose: str) -> None:
    address = UnixAddress(path=str(path))
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.bind(str(path))
        inode = address.inode
        assert inode is not None
        if whose != "own":
            path.unlink()
        if whose == "other":
            second.bind(str(path))
            second.listen()
        with address.other_server_kept(inode):
            path.unlink(missing_ok=True)
        assert list(path.parent.iterdir()) == ([path] if whose == "other" else [])
        if whose == "other":
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(path))
