"""Bad input over gRPC: refused at once with a status that names field, value and range; a good
request right behind it is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import pytest

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from griffin_client import (
    GriffinClient,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from griffin_core.model.load import Model
from griffin_server.transfer.protocol import NEWEST, OLDEST
from tests.servers import Running, running
from tests.tiny import CONTEXT, VOCABULARY


@pytest.fixture
def client(tiny_server: Running) -> Iterator[GriffinClient]:
    with tiny_server.client() as connected:
        yield connected


def serves(client: GriffinClient) -> None:
    done = client.complete("all is well", max_tokens=3, ignore_eos=True)
    assert done.finished.usage.generated_tokens == 3
    assert client.list_sessions() == []


NAN = float("nan")
INFINITY = float("inf")
BAD = [
    # request, field, what was given, what is allowed
    ({"density": 0.0}, "pruning.density", "0.0", "(0, 1]"),
    ({"density": -1.0}, "pruning.density", "-1.0", "(0, 1]"),
    ({"density": 1.5}, "pruning.density", "1.5", "(0, 1]"),
    ({"density": NAN}, "pruning.density", "nan", "(0, 1]"),
    ({"policy": "best"}, "pruning.policy", "best", "topk, "),
    ({"topk_share": 1.5}, "pruning.parameters.topk_share", "1.5", "[0, 1]"),
    ({"topk_share": NAN}, "pruning.parameters.topk_share", "nan", "[0, 1]"),
    (
        {"topk_share": 0.5, "policy": "sampled"},
        "pruning.parameters.topk_share",
        "0.5 with policy sampled",
        "policy topk_sampled",
    ),
    (
        {"topk_share": 0.5},  # and the server's default policy
        "pruning.parameters.topk_share",
        "0.5 with policy topk",
        "policy topk_sampled",
    ),
    ({"warmup_tokens": (1 << 20) + 1}, "pruning.warmup_tokens", "1048577", "[0, 1048576]"),
    ({"agreement_floor": 0.0}, "pruning.agreement_floor", "0.0", "(0, 1)"),
    ({"agreement_floor": 1.0}, "pruning.agreement_floor", "1.0", "(0, 1)"),
    ({"agreement_floor": NAN}, "pruning.agreement_floor", "nan", "(0, 1)"),
    ({"agreement_floor": 0.5, "density": 0.5}, "pruning.density", "0.5", "none beside"),
    ({"speculation": "eagle"}, "speculation", "eagle", "off, lookup, slim, auto"),
    ({"verify": "both"}, "verify", "both", "dense, experts"),
    (
        {"speculation": "slim", "verify": "experts"},
        "verify",
        "experts with speculation slim",
        "dense",
    ),
    ({"speculation": "lookup", "draft_tokens": 0}, "draft_tokens", "0", "[1, 16]"),
    ({"speculation": "lookup", "draft_tokens": 17}, "draft_tokens", "17", "[1, 16]"),
    ({"prompt": ""}, "text", "an empty prompt", "at least one token"),
    ({"prompt": None}, "input", "none", "exactly one of text, token_ids, messages"),
    ({"prompt": "a", "token_ids": [1]}, "input", "text and token_ids", "exactly one of"),
    ({"prompt": "a", "messages": [("user", "b")]}, "input", "text and messages", "exactly one of"),
    ({"prompt": None, "token_ids": [1, VOCABULARY]}, "token_ids[1]", "260", "[0, 260)"),
    ({"prompt": "x" * CONTEXT}, "text", f"{CONTEXT} tokens", "at most 255 tokens"),
    ({"prompt": None, "token_ids": [1] * CONTEXT}, "token_ids", "256 tokens", "at most 255"),
    ({"prompt": None, "messages": [("", "b")]}, "messages[0].role", "''", "not empty"),
    ({"prompt": None, "messages": [("tool", "b")]}, "messages", "roles tool", "no tools"),
    ({"top_p": 2.0}, "sampling.top_p", "2.0", "(0, 1]"),
    ({"top_p": 0.0}, "sampling.top_p", "0.0", "(0, 1]"),
    ({"top_p": NAN}, "sampling.top_p", "nan", "(0, 1]"),
    ({"temperature": -1.0}, "sampling.temperature", "-1.0", ">= 0"),
    ({"temperature": INFINITY}, "sampling.temperature", "inf", ">= 0"),
    ({"temperature": NAN}, "sampling.temperature", "nan", ">= 0"),
    ({"min_p": 1.5}, "sampling.min_p", "1.5", "[0, 1]"),
    (
        {"repetition_penalty": 0.0},
        "sampling.repetition_penalty",
        "0.0",
        "[0.01, 100]",
    ),
    ({"presence_penalty": 3.0}, "sampling.presence_penalty", "3.0", "[-2, 2]"),
    ({"frequency_penalty": -3.0}, "sampling.frequency_penalty", "-3.0", "2"),
    ({"logit_bias": {1: 101.0}}, "sampling.logit_bias[1]", "101", "[-100, 100]"),
    ({"logit_bias": {1: NAN}}, "sampling.logit_bias[1]", "nan", "[-100, 100]"),
    ({"logit_bias": {260: 1.0}}, "sampling.logit_bias[0]", "260", "[0, 260)"),
    (
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        "sampling.logit_bias",
        "1025",
        "1024",
    ),
    ({"max_tokens": 0}, "stopping.max_tokens", "0", ">= 1"),
    ({"stop": ["x"] * 300}, "stopping.stop", "300", "16"),
    ({"stop": ["x", ""]}, "stopping.stop[1]", "0 characters", "1 to 256"),
    ({"stop": ["x" * 257]}, "stopping.stop[0]", "257", "1 to 256"),
    (
        {"stop_token_ids": [260]},
        "stopping.stop_token_ids[0]",
        "260",
        "[0, 260)",
    ),
    ({"stop_token_ids": range(65)}, "stopping.stop_token_ids", "65", "64"),
    ({"top_logprobs": 21}, "top_logprobs", "21", "[0, 20]"),
    ({"request_id": "x" * 129}, "request_id", "xxx", "128"),
    ({"request_id": "a\nb"}, "request_id", r"a\nb", "printable ASCII"),
    (
        {"prompt": None, "messages": [("user", "b")], "session_id": "s"},
        "messages",
        "with session_id",
        "text or token_ids",
    ),
]


@pytest.mark.parametrize(
    ("request_", "field", "given", "allowed"), BAD, ids=[f"{b[1]}={b[2]}"[:60] for b in BAD]
)
def test_a_value_out_of_range_is_refused_by_name(
    client: GriffinClient, request_: dict[str, object], field: str, given: str, allowed: str
) -> None:
    options = {"prompt": "a", **request_}
    with pytest.raises(InvalidArgument) as caught:
        client.complete(**options, timeout=30)  # type: ignore[arg-type]
    error = caught.value
    assert error.reason == "INVALID_REQUEST"
    assert list(error.violations) == [field]
    assert error.message.startswith(f"{field}: got ")
    got, _, range_ = error.message.partition("; allowed: ")
    assert given in got and allowed in range_
    serves(client)


@pytest.mark.parametrize(
    ("request_", "field", "allowed"),
    [
        (pb.ScoreRequest(), "context", "exactly one of"),
        (pb.ScoreRequest(context="a"), "continuation", "exactly one of"),
        (pb.ScoreRequest(context="", continuation="a"), "context", "at least one token"),
        (pb.ScoreRequest(context="a", continuation=""), "continuation", "at least one token"),
        (
            pb.ScoreRequest(context="a", continuation_token_ids=[1]),
            "continuation",
            "both as text or both as token ids",
        ),
        (
            pb.ScoreRequest(context="a", context_token_ids=[1], continuation="b"),
            "context",
            "exactly one of",
        ),
        (
            pb.ScoreRequest(context_token_ids=[300], continuation_token_ids=[1]),
            "context_token_ids[0]",
            "[0, 260)",
        ),
        (
            pb.ScoreRequest(context_token_ids=[1], continuation_token_ids=[1, 300]),
            "continuation_token_ids[1]",
            "[0, 260)",
        ),
        (pb.ScoreRequest(context="a" * 200, continuation="b" * 57), "continuation", "at most 256"),
        (
            pb.ScoreRequest(
                context="a", continuation="b", continuations=[pb.Continuation(text="c")]
            ),
            "continuation",
            "exactly one of continuation, continuation_token_ids, continuations",
        ),
        (
            pb.ScoreRequest(context="a", continuations=[pb.Continuation(text="b")] * 257),
            "continuations",
            "1 to 256",
        ),
        (
            pb.ScoreRequest(
                context="a", continuations=[pb.Continuation(text="b"), pb.Continuation()]
            ),
            "continuations[1]",
            "exactly one of text, token_ids",
        ),
        (
            pb.ScoreRequest(context="a", continuations=[pb.Continuation(text="b", token_ids=[1])]),
            "continuations[0]",
            "exactly one of text, token_ids",
        ),
        (
            pb.ScoreRequest(
                context="a",
                continuations=[pb.Continuation(text="b"), pb.Continuation(token_ids=[1])],
            ),
            "continuations[1]",
            "both as text or both as token ids",
        ),
        (
            pb.ScoreRequest(context_token_ids=[1], continuations=[pb.Continuation(text="b")]),
            "continuations[0]",
            "both as text or both as token ids",
        ),
        (
            pb.ScoreRequest(
                context="a", continuations=[pb.Continuation(text="b"), pb.Continuation(text="")]
            ),
            "continuations[1]",
            "at least one token",
        ),
        (
            pb.ScoreRequest(
                context_token_ids=[1],
                continuations=[pb.Continuation(token_ids=[1]), pb.Continuation(token_ids=[2, 300])],
            ),
            "continuations[1].token_ids[1]",
            "[0, 260)",
        ),
        (
            pb.ScoreRequest(
                context="a" * 200,
                continuations=[pb.Continuation(text="b"), pb.Continuation(text="b" * 57)],
            ),
            "continuations[1]",
            "at most 256",
        ),
        (
            pb.ScoreRequest(
                context_token_ids=[1],
                continuations=[pb.Continuation(token_ids=[2])],
                add_special_tokens=True,
            ),
            "add_special_tokens",
            "with context",
        ),
        (
            pb.ScoreRequest(context="a", continuation="b", mode=pb.SCORE_MODE_CLASSIFICATION),
            "context",
            "at least two tokens with mode classification",
        ),
        (
            pb.ScoreRequest(context="a", continuation="b", mode=3),  # type: ignore[arg-type]
            "mode",
            "1 (generation), 2 (classification)",
        ),
        (
            # Another client's number, which ours would not send.
            pb.ScoreRequest(context="a", continuation="b", pruning=pb.Pruning(policy=9)),  # type: ignore[arg-type]
            "pruning.policy",
            "1 (topk)",
        ),
        (
            pb.ScoreRequest(context="a", continuation="b", pruning=pb.Pruning(density=NAN)),
            "pruning.density",
            "(0, 1]",
        ),
    ],
)
def test_a_bad_score_request_is_refused_by_name(
    tiny_server: Running,
    client: GriffinClient,
    request_: pb.ScoreRequest,
    field: str,
    allowed: str,
) -> None:
    with grpc.insecure_channel(tiny_server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Score(request_, timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = caught.value.details()
    assert details is not None and details.startswith(f"{field}: got ") and allowed in details
    serves(client)


def test_an_unknown_session_is_not_found(client: GriffinClient) -> None:
    with pytest.raises(NotFound, match="no session 'nobody'"):
        client.complete("a", session_id="nobody")
    with pytest.raises(NotFound, match="no session 'nobody'"):
        client.get_session("nobody")
    with pytest.raises(NotFound, match="no session 'nobody'"):
        client.close_session("nobody")
    serves(client)


def test_a_chat_needs_a_template(tiny: Callable[[str], Model]) -> None:
    with running(tiny("opt")) as server, server.client() as client:
        assert not client.model_info().has_chat_template
        with pytest.raises(InvalidArgument, match=r"messages: .*chat template"):
            client.complete(messages=[("user", "hi")])
        serves(client)


def test_a_request_larger_than_any_that_fits_is_not_parsed(client: GriffinClient) -> None:
    """The default is 8 bytes a token of the context and at least 256 KiB."""
    for request in ({"prompt": "a" * 300_000}, {"token_ids": [1] * 300_000}):
        with pytest.raises(
            ResourceExhausted, match=r"at most 262144 \(--max-request-bytes\)"
        ) as no:
            client.complete(**request)
        assert no.value.retry_after_s is None
    client.complete("a", max_tokens=1)


def test_an_oversized_message_is_refused_by_grpc(client: GriffinClient) -> None:
    with pytest.raises(ResourceExhausted, match="larger than max"):
        client.complete("x" * (5 << 20))
    serves(client)


def prefill_request(model: Model, **fields: object) -> prefill_pb2.PrefillRequest:
    selection = {"density": 0.5} | {
        k: fields.pop(k)
        for k in ("density", "policy", "parameters", "correction", "correction_rank")
        if k in fields
    }
    good = {
        "model_fingerprint": model.fingerprint,
        "calibration_digest": model.decoder.calibration_digest,
        "token_ids": [1, 2],
        "oldest_protocol_version": OLDEST,
        "newest_protocol_version": NEWEST,
        "selection": prefill_pb2.ExpertSelection(**selection),  # type: ignore[arg-type]
    }
    return prefill_pb2.PrefillRequest(**{**good, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"model_fingerprint": "f" * 64}, "FAILED_PRECONDITION", ["model_fingerprint", "ffff"]),
        ({"model_fingerprint": ""}, "FAILED_PRECONDITION", ["model_fingerprint", "''"]),
        ({"calibration_digest": "beef"}, "FAILED_PRECONDITION", ["calibration_digest", "beef"]),
        ({"correction": 9}, "INVALID_ARGUMENT", ["selection.correction", "9", "2 (bias)"]),
        (
            {"correction": 2, "correction_rank": 3},
            "INVALID_ARGUMENT",
            ["selection.correction_rank", "3 with bias", "residual only"],
        ),
        (
            {"correction": 3, "correction_rank": 257},
            "INVALID_ARGUMENT",
            ["selection.correction_rank", "257", "[1, 256]"],
        ),
        (
            {"oldest_protocol_version": 0, "newest_protocol_version": 0},  # before Griffin 0.2
            "FAILED_PRECONDITION",
            ["protocol_version", "decode understands 0,", f"prefill {NEWEST};"],
        ),
        (
            {"oldest_protocol_version": NEWEST + 1, "newest_protocol_version": NEWEST + 3},
            "FAILED_PRECONDITION",
            ["protocol_version", f"{NEWEST + 1} to {NEWEST + 3}", f"prefill {NEWEST};"],
        ),
        ({"token_ids": []}, "INVALID_ARGUMENT", ["token_ids", "0 tokens", "1 to 256"]),
        ({"token_ids": [1] * 257}, "INVALID_ARGUMENT", ["token_ids", "257", "1 to 256"]),
        ({"token_ids": [260]}, "INVALID_ARGUMENT", ["token_ids[0]", "260", "[0, 260)"]),
        ({"density": 0.0}, "INVALID_ARGUMENT", ["selection.density", "0.0", "(0, 1]"]),
        ({"density": NAN}, "INVALID_ARGUMENT", ["selection.density", "nan", "(0, 1]"]),
        ({"policy": 77}, "INVALID_ARGUMENT", ["selection.policy", "77", "1 (topk)"]),
        (
            {"parameters": pb.SelectionParameters(topk_share=0.5)},
            "INVALID_ARGUMENT",
            ["selection.parameters.topk_share", "0.5 with policy topk", "policy topk_sampled"],
        ),
    ],
)
def test_a_bad_prefill_request_is_refused_before_anything_is_sent(
    tiny_server: Running,
    client: GriffinClient,
    fields: dict[str, object],
    code: str,
    words: list[str],
) -> None:
    with grpc.insecure_channel(tiny_server.prefill_target) as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        request = prefill_request(tiny_server.app.engine.model, **fields)
        received = []
        with pytest.raises(grpc.RpcError) as caught:
            received.extend(stub.Prefill(request, timeout=30))
    assert received == []
    assert caught.value.code().name == code
    for word in words:
        assert word in (caught.value.details() or "")
    serves(client)
