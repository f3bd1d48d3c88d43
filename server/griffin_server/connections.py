"""The gRPC options of a server and of a channel to a prefill server, keepalive above all.

Keepalive is set on both ends (github.com/grpc/grpc, doc/keepalive.md): the end that pings sets how
often, and whether also without a call; the end that is pinged sets how often it accepts pings, and
whether also without a call. By default a server accepts one ping in two hours from an idle client,
and closes the connection of a client that sends more. The client SDK has its own copy of its
options, because it does not import the server.
"""

from __future__ import annotations

from typing import Any

LEAST_PING_INTERVAL_MS = 5_000
"""How often clients may ping, with or without a call. The shortest interval of grpc-go is 10 s."""


LARGEST_REQUEST = 4 << 20
"""Bytes of the largest message that a server receives where the settings say nothing. What it
parses is far less; see ``default_request_bytes``."""


def default_request_bytes(context_length: int) -> int:
    """Bytes of the largest request that is parsed where the settings say nothing."""
    return min(LARGEST_REQUEST, max(256 << 10, 8 * context_length))


GRACE_MS = 10_000
"""How much longer than its last call a connection is kept, so that the call ends by itself."""

LEAST_STREAMS = 100
"""Calls at once that every connection may have, as HTTP/2 recommends (RFC 9113, 6.5.2)."""


def server_options(
    max_request_bytes: int | None, max_call_s: float, most_calls: int
) -> list[tuple[str, Any]]:
    """The options of a server.

    Args:
        most_calls: how many calls the server can run and let wait. One connection has no more at
            once, and at least ``LEAST_STREAMS``; its further calls wait in the client. gRPC drops
            calls of all clients with CANCELLED once 1000 have come and not begun.
        max_call_s: the longest call. A connection is as long open to new calls, and as much longer
            to those that run then.
    """
    age_ms = int(1000 * max_call_s)
    return [
        ("grpc.max_concurrent_streams", max(LEAST_STREAMS, most_calls)),
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", age_ms + GRACE_MS),
        ("grpc.max_receive_message_length", max_request_bytes or LARGEST_REQUEST),
        ("grpc.so_reuseport", 0),  # a second server on the port is a mistake
        ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # Two pings may come early, as after a network pause; the third closes the connection.
        ("grpc.http2.max_ping_strikes", 2),
        # The session of a client that vanished without closing its connection is freed.
        ("grpc.keepalive_time_ms", 20_000),
        *ping_timeout(10_000),
    ]


def ping_timeout(milliseconds: int) -> list[tuple[str, Any]]:
    """How long an end waits for the answer to a ping before it closes the connection. gRPC waits
    for ``ping_timeout_ms``, a minute by default, also where ``keepalive_timeout_ms`` is less."""
    return [
        ("grpc.keepalive_timeout_ms", milliseconds),
        ("grpc.http2.ping_timeout_ms", milliseconds),
    ]


PREFILL_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.lb_policy_name", "round_robin"),
    # A message holds at least one token's KV in one layer, which is far smaller than this.
    ("grpc.max_receive_message_length", 64 << 20),
    # A restarted prefill server is found within prefill_pool.client.CONNECT_S.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A connection that dies between two prompts is noticed before the next one.
    ("grpc.keepalive_time_ms", 10_000),
    *ping_timeout(5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The servers are in one cluster; a proxy in the environment is for other traffic.
    ("grpc.enable_http_proxy", 0),
]
