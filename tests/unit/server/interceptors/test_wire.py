"""What is seen of a request before it is parsed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import grpc
import pytest

from griffin.v1 import generation_pb2 as pb
from griffin_core.model.load import Model
from griffin_server.interceptors.wire import MOST_FIELDS, least_counts, number_fields
from tests.servers import running

IDS = pb.GenerateRequest.DESCRIPTOR.fields_by_name["token_ids"].number


def counts(request: pb.GenerateRequest) -> dict[int, int]:
    return dict(least_counts(request.SerializeToString()))


def test_lists_of_token_ids_are_known_by_their_type() -> None:
    assert number_fields(pb.GenerateRequest)[IDS] == "token_ids"
    assert pb.GenerateRequest.DESCRIPTOR.fields_by_name["text"].number not in number_fields(
        pb.GenerateRequest
    )


@pytest.mark.parametrize("token", [0, 1, 127, 128, 50_000, 2**32 - 1])
@pytest.mark.parametrize("count", [1, 10, 5000])
def test_a_list_holds_at_least_what_is_counted(token: int, count: int) -> None:
    """And at least a fifth of it is counted."""
    request = pb.GenerateRequest(token_ids=[token] * count, session_id="s", request_id="r" * 300)
    request.sampling.temperature = 0.5
    least = counts(request)[IDS]
    assert count // 5 <= least <= count


def test_any_bytes_may_come() -> None:
    draw = random.Random(5)
    for _ in range(3000):
        data = draw.randbytes(draw.randrange(40))
        assert len(list(least_counts(data))) <= MOST_FIELDS
    assert len(list(least_counts(b"\x0a\x00" * 10_000))) == MOST_FIELDS
    assert list(least_counts(b"")) == []


@pytest.mark.parametrize(
    "method", ["Generate", "AnalyzePrompt"], ids=["GenerateRequest", "AnalyzePromptRequest"]
)
def test_more_ids_than_the_context_holds_are_not_parsed(
    method: str, tiny: Callable[[str], Model]
) -> None:
    """The last byte makes the message malformed, which only a parser would notice."""
    kind = getattr(pb, f"{method}Request")
    with (
        running(tiny("llama"), max_request_bytes=4 << 20) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        call = channel.unary_stream(f"/griffin.v1.GenerationService/{method}")
        many = kind(token_ids=[1] * 1_000_000).SerializeToString()
        for data in (many, many + b"\xff"):
            clock = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                next(call(data))
            assert time.monotonic() - clock < 5
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            words = "token_ids: got more than 200000 tokens; allowed: at most 256"
            assert words in caught.value.details()
        few = kind(token_ids=[1] * 200, request_id="r" * 2000).SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            next(call(few))
        assert "request_id" in caught.value.details()  # it was parsed
