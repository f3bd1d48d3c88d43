"""Which server a client calls, how it is encrypted, who calls, and the options of gRPC."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc

from griffin_client.errors import invalid_argument

ApiKey: TypeAlias = str | Callable[[], str]
"""What says who calls: a key or a token, or a function that returns the present one."""

API_KEY_VARIABLE = "GRIFFIN_API_KEY"
TLS_VARIABLES = {
    "ca": "GRIFFIN_CA_CERT",
    "cert": "GRIFFIN_CLIENT_CERT",
    "key": "GRIFFIN_CLIENT_KEY",
}
"""The environment variables with the paths of ``Tls``."""

DEFAULT_TARGET = "localhost:50051"
TARGET_VARIABLE = "GRIFFIN_TARGET"

CHANNEL_OPTIONS = [
    # A dead connection is noticed within half a minute, during a call and between calls. Griffin
    # servers allow pings on idle connections.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # gRPC waits for this one, by default a minute
    ("grpc.keepalive_permit_without_calls", 1),
]

LOOPBACK = re.compile(r"(dns:(///)?)?(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class Tls:
    """The files, in PEM, with which a connection is encrypted. ``Tls()`` trusts the authorities
    that gRPC does.

    Args:
        ca: the certificates of the authorities that the server's must come from.
        cert, key: the client's own certificate and its key, for servers that ask for one.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """The credentials of a channel.

        Raises:
            InvalidArgument: a file cannot be read or is no PEM, the key is of another certificate,
                or only one of cert and key is given.
        """
        if (self.cert is None) != (self.key is None):
            raise invalid_argument("tls", self, "allowed: both cert and key, or none")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # it says what is wrong; gRPC does not
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
            ca, key, cert = (
                None if path is None else Path(path).read_bytes()
                for path in (self.ca, self.key, self.cert)
            )
        except OSError as error:
            why = f"cannot use the files ({error.strerror or error})"
            raise invalid_argument("tls", self, why) from error
        return grpc.ssl_channel_credentials(ca, key, cert)

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """What changes when one of the files does; empty while one is missing."""
        paths = [path for path in (self.ca, self.cert, self.key) if path is not None]
        try:
            found = [os.stat(path) for path in paths]
        except OSError:
            return ()
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)


def api_key_or_default(api_key: ApiKey | None) -> ApiKey | None:
    """The key as given, else the environment's ``GRIFFIN_API_KEY``, else None."""
    return api_key or os.environ.get(API_KEY_VARIABLE) or None


def key_metadata(api_key: ApiKey | None) -> tuple[tuple[str, str], ...]:
    """The metadata that says who calls; empty without a key."""
    if api_key is None:
        return ()
    return (("authorization", f"Bearer {api_key if isinstance(api_key, str) else api_key()}"),)


def tls_of(target: str, tls: Tls | None, *, has_key: bool) -> Tls | None:
    """The TLS of a channel to this target; None for plain text.

    Args:
        tls: None for what the environment says.
        has_key: whether a key is sent.

    Raises:
        InvalidArgument: a key would be sent in plain text to another machine.
    """
    if tls is None:
        paths = {name: os.environ.get(variable) for name, variable in TLS_VARIABLES.items()}
        tls = Tls(**{n: path or None for n, path in paths.items()}) if any(paths.values()) else None
    if tls is None and has_key and not (LOOPBACK.fullmatch(target) or target.startswith("unix:")):
        raise invalid_argument(
            "api_key",
            target,
            "without tls the key would be sent in plain text; allowed: with tls=Tls(...), or to "
            "this machine",
        )
    return tls


def target_or_default(target: str | None) -> str:
    """The target as given, else the environment's ``GRIFFIN_TARGET``, else localhost:50051."""
    return target or os.environ.get(TARGET_VARIABLE) or DEFAULT_TARGET


def channel_options(target: str) -> list[tuple[str, int]]:
    """Options of a channel to this target.

    gRPC would send even calls to this machine through the HTTP proxy that the environment names;
    for a loopback target the options turn that off.
    """
    if LOOPBACK.fullmatch(target):
        return [*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)]
    return CHANNEL_OPTIONS
