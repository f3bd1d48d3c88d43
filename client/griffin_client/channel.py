"""Which server a client calls, how it is encrypted, who calls, and the options of gRPC."""

from __future__ import annotations

import os
import re
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
            InvalidArgument: a file cannot be read, or only one of cert and key is given.
        """
        if (self.cert is None) != (self.key is None):
            raise invalid_argument("tls", self, "allowed: both cert and key, or none")
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))


def _read(path: str | Path | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise invalid_argument("tls", str(path), f"cannot read it ({error.strerror})") from error


def api_key_or_default(api_key: ApiKey | None) -> ApiKey | None:
    """The key as given, else the environment's ``GRIFFIN_API_KEY``, else None."""
    return api_key or os.environ.get(API_KEY_VARIABLE) or None


def key_metadata(api_key: ApiKey | None) -> tuple[tuple[str, str], ...]:
    """The metadata that says who calls; empty without a key."""
    if api_key is None:
        return ()
    return (("authorization", f"Bearer {api_key if isinstance(api_key, str) else api_key()}"),)


def credentials_of(
    target: str, tls: Tls | None, *, has_key: bool
) -> grpc.ChannelCredentials | None:
    """The credentials of a channel to this target; None for plain text.

    Args:
        tls: None for what the environment says.
        has_key: whether a key is sent.

    Raises:
        InvalidArgument: a file cannot be read, or a key would be sent in plain text to another
            machine.
    """
    if tls is None:
        paths = {name: os.environ.get(variable) for name, variable in TLS_VARIABLES.items()}
        tls = Tls(**{n: path or None for n, path in paths.items()}) if any(paths.values()) else None
    if tls is not None:
        return tls.credentials()
    if has_key and not (LOOPBACK.fullmatch(target) or target.startswith("unix:")):
        raise invalid_argument(
            "api_key",
            target,
            "without tls the key would be sent in plain text; allowed: with tls=Tls(...), or to "
            "this machine",
        )
    return None


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
