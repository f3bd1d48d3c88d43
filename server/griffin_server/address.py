"""Where a server listens, and where others are: read, resolved and written here and nowhere else.

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
"""Of a Unix socket's path: ``sun_path`` of unix(7) less its final zero."""

SOCKET_MODE = 0o660
"""A Unix socket is for its owner and group; who may connect needs the right to write."""

LIVE_S = 1.0
"""How long a socket file's server may take to accept before it counts as live and busy."""

HOST_ALLOWED = (
    "a name, an IPv4 or IPv6 address without port (127.0.0.1, ::1, 0.0.0.0), or unix:PATH"
)
TARGET_ALLOWED = "host:port, [IPv6]:port, unix:PATH, or a gRPC name such as dns:///prefill:50052"

_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_GRPC_NAME = re.compile(r"(dns|ipv4|ipv6|unix-abstract|vsock|xds):.+")


class ListenError(GriffinError):
    """An address cannot be listened on.

    Args:
        name: the port's setting.
        error: an OSError that says why, or gRPC's.
    """

    def __init__(self, name: str, address: Address, error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) else None
        if why is not None:  # socket.create_server adds its arguments, which are said already
            why = why.partition(" (while attempting")[0]
        super().__init__(f"host, {name}: cannot listen on {address} ({why or error})")


@dataclass(frozen=True, kw_only=True)
class TcpAddress:
    """A host and a port.

    Args:
        host: a name, or an IP address without brackets.
        port: 0 to listen on a free one.
    """

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def resolved(self) -> list[TcpAddress]:
        """The IP addresses of the host. One that stands for all of IPv4 stands for all of IPv6 as
        well where the machine has both, as gRPC reads it.

        Raises:
            OSError: there is no such name.
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
        path: of its file, at most ``MOST_PATH_BYTES`` long.
    """

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def claim(self) -> None:
        """Makes room for a socket: removes the file of one whose server has gone.

        Raises:
            OSError: somebody listens there, it is no socket, or none can be made.
        """
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
                raise OSError(errno.EEXIST, "there is a file of that name, which is no socket")
            with socket.socket(socket.AF_UNIX) as caller:
                caller.settimeout(LIVE_S)
                try:
                    caller.connect(self.path)
                except ConnectionRefusedError:  # nobody listens any more
                    os.unlink(self.path)
                except TimeoutError:  # somebody does and is busy
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
                else:
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        with socket.socket(socket.AF_UNIX) as probe:  # says why not, which gRPC does not
            probe.bind(self.path)
        os.unlink(self.path)

    @property
    def inode(self) -> tuple[int, int] | None:
        """Device and inode of its file; None if there is none."""
        with suppress(FileNotFoundError):
            status = os.lstat(self.path)
            return status.st_dev, status.st_ino
        return None

    @contextmanager
    def spared(self, own: tuple[int, int]) -> Iterator[None]:
        """Within it the file may be removed by its path, as gRPC does when it stops to listen. If
        that was another server's file, it is there again afterwards.

        Args:
            own: ``inode`` of the file that may go.
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
        """Gives the file its mode, ``SOCKET_MODE``."""
        os.chmod(self.path, SOCKET_MODE)


Address = TcpAddress | UnixAddress


def parse_host(host: str, port: int) -> Address:
    """Where to listen, of the settings ``host`` and ``port``; a Unix socket has no port.

    Raises:
        ValueError: with what is allowed.
    """
    if host.startswith("unix:"):
        return UnixAddress(path=_unix_path(host))
    bare = _without_brackets(host)
    if not _is_host(bare):
        raise ValueError(f"allowed: {HOST_ALLOWED}")
    return TcpAddress(host=bare, port=port)


def check_target(target: str) -> str:
    """The address of another server, if it is one.

    Raises:
        ValueError: with what is allowed.
    """
    if target.startswith("unix:"):
        _unix_path(target)
    elif not _GRPC_NAME.fullmatch(target):
        host, _, port = target.rpartition(":")
        is_host = _is_host(_without_brackets(host)) and (":" not in host or host.endswith("]"))
        if not (is_host and port.isdecimal() and port.isascii() and 0 < int(port) <= 65535):
            raise ValueError(f"allowed: {TARGET_ALLOWED}")
    return target


def listen(address: TcpAddress) -> list[socket.socket]:
    """Sockets that listen on each IP address of the host, all on one port. An address that this
    machine does not have, as ::1 of ``localhost`` where IPv6 is off, is left out unless it is the
    only one.

    Raises:
        OSError: the port is taken on one of them, or none of them is this machine's.
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
    """Where a socket listens, by IP address."""
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
    """[::1] -> ::1; anything else as it is, for brackets are for colons."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") and ":" in host else host


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_host(text: str) -> bool:
    """Whether it is an IP address, or can be a name: numbers and dots alone are no name."""
    if _is_ip(text):
        return True
    return bool(_NAME.fullmatch(text)) and not re.fullmatch(r"[\d.]+", text) and len(text) <= 253
