"""Addresses of servers: parsing, resolving, formatting and listening.

An address is written as gRPC writes it (github.com/grpc/grpc, doc/naming.md): ``10.0.0.1:50051``,
``[::1]:50051``, ``name:50051``, ``unix:/run/griffin.sock``.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

from griffin_core.errors import GriffinError

MOST_PATH_BYTES = 107
"""The longest path of a Unix socket: ``sun_path`` of unix(7) without its final zero byte."""

SOCKET_MODE = 0o660
"""Connecting to a Unix socket takes the permission to write, which its owner and group have."""

LIVE_S = 1.0
"""Seconds after which a socket whose server does not accept counts as in use by a busy server."""

HOST_ALLOWED = (
    "a name, an IPv4 or IPv6 address without port (127.0.0.1, ::1, 0.0.0.0), or unix:PATH"
)
TARGET_ALLOWED = "host:port, [IPv6]:port, unix:PATH, or a gRPC name such as dns:///prefill:50052"

_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_GRPC_NAME = re.compile(r"(dns|ipv4|ipv6|unix-abstract|vsock|xds):.+")


class ListenError(GriffinError):
    """The server cannot listen on an address.

    Args:
        name: the setting of the port.
        error: an OSError with the reason, or an error of gRPC.
    """

    def __init__(self, name: str, address: Address, error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) else None
        if why is not None:  # socket.create_server repeats its arguments
            why = why.partition(" (while attempting")[0]
        super().__init__(f"host, {name}: cannot listen on {address} ({why or error})")


@dataclass(frozen=True, kw_only=True)
class TcpAddress:
    """A host and a port.

    Args:
        host: a name, or an IP address without brackets.
        port: 0 listens on a free one.
    """

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it. Of names, only localhost is known to be so."""
        if _is_ip(self.host):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host.rstrip(".").lower() == "localhost"

    def resolved(self) -> list[TcpAddress]:
        """The host's IP addresses. On a machine that has IPv6, the address for all of IPv4 means
        all of both, as in gRPC.

        Raises:
            OSError: the name cannot be resolved.
        """
        if self.host in ("0.0.0.0", "::"):
            return [replace(self, host="::" if socket.has_dualstack_ipv6() else "0.0.0.0")]
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        numeric = (
            socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
            for *_, address in found
        )
        return [replace(self, host=host) for host in dict.fromkeys(numeric)]


@dataclass(frozen=True, kw_only=True)
class UnixAddress:
    """A Unix socket.

    Args:
        path: the path of its file, at most ``MOST_PATH_BYTES`` long.
    """

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def claim(self) -> None:
        """Prepares for listening: removes the socket's file if its server has ended.

        Raises:
            OSError: another server listens there, the file is not a socket, or none can be created.
        """
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
                raise OSError(errno.EEXIST, "the file exists and is no socket")
            if not server_has_ended(self.path):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            os.unlink(self.path)
        with socket.socket(socket.AF_UNIX) as probe:  # its errors say why; gRPC's do not
            probe.bind(self.path)
        os.unlink(self.path)

    @property
    def inode(self) -> tuple[int, int] | None:
        """The device and inode of the socket's file; None if the file does not exist."""
        with suppress(FileNotFoundError):
            status = os.lstat(self.path)
            return status.st_dev, status.st_ino
        return None

    @contextmanager
    def other_server_kept(self, own: tuple[int, int]) -> Iterator[None]:
        """A context in which gRPC may remove the file at this path when it stops listening. If the
        file belongs to another server, it is restored afterwards.

        Args:
            own: the ``inode`` of this server's own file.
        """
        second = f"{self.path}.{os.getpid()}"
        with ExitStack() as stack:
            if self.inode not in (None, own):
                with suppress(OSError):  # on a file system without links
                    os.link(self.path, second)
                    stack.callback(os.unlink, second)
                    stack.callback(self._put_back, second)
            yield

    def _put_back(self, second: str) -> None:
        with suppress(FileExistsError):
            os.link(second, self.path)

    def open_to_group(self) -> None:
        """Sets the file's mode to ``SOCKET_MODE``."""
        os.chmod(self.path, SOCKET_MODE)


Address = TcpAddress | UnixAddress


def parse_host(host: str, port: int) -> Address:
    """The address of the settings ``host`` and ``port``. A Unix socket has no port.

    Raises:
        ValueError: the host is malformed; the message says what is allowed.
    """
    if host.startswith("unix:"):
        return UnixAddress(path=_unix_path(host))
    bare = _without_brackets(host)
    if not _is_host(bare):
        raise ValueError(f"allowed: {HOST_ALLOWED}")
    return TcpAddress(host=bare, port=port)


def check_target(target: str) -> str:
    """Returns the address of another server if it is well-formed.

    Raises:
        ValueError: it is malformed; the message says what is allowed.
    """
    if target.startswith("unix:"):
        _unix_path(target)
    elif not _GRPC_NAME.fullmatch(target):
        host, _, port = target.rpartition(":")
        is_host = _is_host(_without_brackets(host)) and (":" not in host or host.endswith("]"))
        if not (is_host and port.isdecimal() and port.isascii() and 0 < int(port) <= 65535):
            raise ValueError(f"allowed: {TARGET_ALLOWED}")
    return target


def server_has_ended(path: str, kind: int = socket.SOCK_STREAM) -> bool:
    """Whether a Unix socket's file is left of a server that has ended. One that does not accept in
    time is alive and busy.

    Args:
        kind: of the socket.

    Raises:
        OSError: the file does not exist, is no such socket, or may not be opened.
    """
    with socket.socket(socket.AF_UNIX, kind) as caller:
        caller.settimeout(LIVE_S)
        try:
            caller.connect(path)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            pass
        return False


def listen(address: TcpAddress) -> list[socket.socket]:
    """Sockets that listen on each IP address of the host, all on one port. Addresses that this
    machine does not have, such as ::1 of ``localhost`` without IPv6, are skipped.

    Raises:
        OSError: the port is in use on one of them, or this machine has none of them.
    """
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for one in address.resolved():
            port = sockets[0].getsockname()[1] if sockets else one.port
            everywhere = one.host == "::"
            family = socket.AF_INET6 if ":" in one.host else socket.AF_INET
            try:
                sockets.append(
                    socket.create_server(
                        (one.host, port), family=family, dualstack_ipv6=everywhere, backlog=128
                    )
                )
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
    except BaseException:
        for opened in sockets:
            opened.close()
        raise
    if missing is not None and not sockets:
        raise missing
    return sockets


def address_of(listening: socket.socket) -> TcpAddress:
    """The IP address and port on which a socket listens."""
    host, port = socket.getnameinfo(
        listening.getsockname(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    )
    return TcpAddress(host=host, port=int(port))


def _unix_path(name: str) -> str:
    path = name.removeprefix("unix:")
    if path.startswith("//"):  # unix://absolute
        path = path.removeprefix("//")
        if not path.startswith("/"):
            raise ValueError("allowed: unix:PATH, or unix:// and an absolute path")
    if not 0 < len(os.fsencode(path)) <= MOST_PATH_BYTES or "\0" in path:
        raise ValueError(f"allowed: unix:PATH, with a path of 1 to {MOST_PATH_BYTES} bytes")
    return path


def _without_brackets(host: str) -> str:
    """[::1] -> ::1. Brackets without a colon between them stay, since they are no IPv6 address."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") and ":" in host else host


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_host(text: str) -> bool:
    """Whether a text is an IP address or a possible name. Digits and dots alone are not a name."""
    if _is_ip(text):
        return True
    return bool(_NAME.fullmatch(text)) and not re.fullmatch(r"[\d.]+", text) and len(text) <= 253
