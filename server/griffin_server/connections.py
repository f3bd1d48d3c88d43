"""How connections are kept: gRPC's options of a server and of a channel to a prefill server.

Keepalive needs its options together (github.com/grpc/grpc, doc/keepalive.md): who pings says how
often, and whether also without a call; who is pinged says how often it may be, and whether also
without a call. A server that is not told allows an idle client one ping in two hours, and ends the
connection of one that sends more. The client SDK has its own copy, since it knows no server.
"""

from __future__ import annotations

from typing import Any

LEAST_PING_INTERVAL_MS = 5_000
"""Clients may ping this often, with or without a call: grpc-go allows its users 10 s at least."""


def server_options(max_request_bytes: int) -> list[tuple[str, Any]]:
    """Options of a server."""
    return [
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a friend
        ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # Two pings may come early, as after a pause of the network; the next ends the connection.
        ("grpc.http2.max_ping_strikes", 2),
        # A client that has vanished without a word gives its session back.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


PREFILL_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.lb_policy_name", "round_robin"),
    # A single token's KV in one layer may be larger than a chunk; nothing comes near this.
    ("grpc.max_receive_message_length", 64 << 20),
    # A restarted prefill server is found again within source.CONNECT_S.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A connection that has died between two prompts is noticed before the next one.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Servers of one cluster: a proxy that the environment names is for the world outside.
    ("grpc.enable_http_proxy", 0),
]
