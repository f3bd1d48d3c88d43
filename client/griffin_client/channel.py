"""Which server a client calls, and with which options of gRPC."""

from __future__ import annotations

import os
import re

DEFAULT_TARGET = "localhost:50051"
TARGET_VARIABLE = "GRIFFIN_TARGET"

CHANNEL_OPTIONS = [
    # A dead connection is noticed within half a minute, during a call and between calls. Griffin
    # servers allow pings on idle connections.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]

LOOPBACK = re.compile(r"(dns:(///)?)?(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")


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
