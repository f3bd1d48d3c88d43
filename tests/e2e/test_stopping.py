"""Stop strings and kept sessions with SmolLM2, over gRPC with the plain stubs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_core.model.load import Model
from tests.servers import Running

pytestmark = pytest.mark.e2e

Stub = generation_pb2_grpc.GenerationServiceStub
FRUIT = "Q: Name a fruit.\nA: apple\nQ: Name a colour.\nA:"
LIST = "List: red, green, blue, yellow,"


@pytest.fixture
def stub(smollm2_server: Running) -> Iterator[Stub]:
    with grpc.insecure_channel(smollm2_server.target) as channel:
        yield Stub(channel)


def generate(stub: Stub, **fields: Any) -> tuple[str, list[int], pb.Finished, str]:
    """Text, tokens, the end and the session's id."""
    events = list(stub.Generate(pb.GenerateRequest(**fields)))
    text = "".join(event.tokens.text for event in events)
    ids = [token for event in events for token in event.tokens.ids]
    return text, ids, events[-1].finished, events[0].started.session_id


def test_the_end_of_a_turn_is_a_stop_string_and_not_shown(stub: Stub, smollm2: Model) -> None:
    asked = {"messages": [pb.ChatMessage(role="user", content="Say hi.")]}
    end = "<|im_end|>"
    (end_id,) = smollm2.tokenizer.encode(end)
    stopping = pb.Stopping(stop=[end], ignore_eos=True, max_tokens=40)
    text, ids, finished, _ = generate(stub, stopping=stopping, **asked)
    assert finished.reason == pb.FINISH_REASON_STOP_SEQUENCE and finished.stop == end
    assert ids[-1] == end_id and ids.count(end_id) == 1 and len(ids) < 40
    assert text and end not in text
    shown = pb.Stopping(max_tokens=40, stop=[end], ignore_eos=True, include_stop_string=True)
    assert generate(stub, stopping=shown, **asked)[0] == text + end
    longer = pb.Stopping(stop=[end], max_tokens=60, min_tokens=len(ids) + 5)
    _, more, *_ = generate(stub, stopping=longer, **asked)
    assert len(more) >= len(ids) + 5 and end_id not in more[: len(ids) + 5]


@pytest.mark.parametrize(
    ("prompt", "stop", "more"),
    [
        (FRUIT, "\nA:", "\nQ: Name a city.\nA:"),
        (FRUIT, "ed", "\nQ: Name a city.\nA:"),
        (LIST, " ", " orange,"),
        (LIST, "urp", " orange,"),
    ],
)
@pytest.mark.parametrize("include", [False, True])
def test_a_kept_session_goes_on_from_what_its_client_saw(
    stub: Stub, smollm2: Model, prompt: str, stop: str, more: str, include: bool
) -> None:
    encode = smollm2.tokenizer.encode
    dense = pb.Pruning(density=1.0)
    stopping = pb.Stopping(stop=[stop], max_tokens=60, include_stop_string=include)
    text, _, finished, session = generate(
        stub, text=prompt, stopping=stopping, pruning=dense, keep_session=True
    )
    assert finished.stop == stop
    assert text.endswith(stop) == include and text.count(stop) == include
    assert finished.usage.context_tokens == len(encode(prompt)) + len(encode(text))
    long = pb.Stopping(max_tokens=20, ignore_eos=True)
    _, ids, after, _ = generate(
        stub, text=more, session_id=session, stopping=long, pruning=dense, top_logprobs=0
    )
    seen = encode(prompt) + encode(text) + encode(more)
    _, whole, *_ = generate(stub, token_ids=seen, stopping=long, pruning=dense)
    assert ids == whole
    assert after.usage.context_tokens == len(seen) + 20


def test_bad_words_come_in_neither_form(stub: Stub) -> None:
    asked = {"text": "The capital of France is", "stopping": pb.Stopping(max_tokens=30)}
    assert "Paris" in generate(stub, **asked)[0]
    text, *_ = generate(stub, sampling=pb.Sampling(bad_words=["Paris", " city of"]), **asked)
    assert "Paris" not in text and " city of" not in text
