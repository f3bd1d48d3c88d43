"""Channels that the client makes itself."""

from __future__ import annotations

import pytest

from griffin_client.channel import channel_options


@pytest.mark.parametrize(
    ("target", "proxied"),
    [
        ("localhost:50051", False),
        ("localhost", False),
        ("127.0.0.1:50051", False),
        ("127.8.0.1:50051", False),
        ("[::1]:50051", False),
        ("dns:///localhost:50051", False),
        ("dns:localhost:50051", False),
        ("griffin.example.com:443", True),
        ("localhost.example.com:50051", True),
        ("10.0.0.1:50051", True),
        ("dns:///griffin:50051", True),
    ],
)
def test_a_server_on_this_machine_is_not_called_by_way_of_a_proxy(
    target: str, proxied: bool
) -> None:
    assert dict(channel_options(target)).get("grpc.enable_http_proxy", 1) == proxied
