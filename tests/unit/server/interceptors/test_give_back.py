"""Memory is given back once after large requests, and not after others."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import grpc
import pytest

from griffin.v1 import generation_pb2 as pb
from griffin_core.model.load import Model
from griffin_server.interceptors import give_back
from tests.servers import eventually, running

GENERATE = "/griffin.v1.GenerationService/Generate"


def test_memory_is_given_back_after_large_requests(
    tiny: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    trims: list[int] = []

    class Library:
        def malloc_trim(self, pad: int) -> None:
            trims.append(pad)

    whole = ctypes.CDLL
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name=None, *more: whole(name, *more) if name else Library()
    )
    monkeypatch.setattr(give_back, "LATER_S", 0.3)
    with (
        running(tiny("llama"), max_request_bytes=4 << 20) as server,
        server.client() as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        client.complete("a", max_tokens=1)
        large = pb.GenerateRequest(text="a" * give_back.LARGE_BYTES).SerializeToString()
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.unary_stream(GENERATE)(large))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not trims
        eventually(lambda: trims == [0])
        client.complete("a", max_tokens=1)
    assert trims == [0]
