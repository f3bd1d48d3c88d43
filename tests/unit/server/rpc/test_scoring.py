"""Score through a server: several continuations of one call, both modes, one server or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_client import (
    AsyncGriffinClient,
    DeadlineExceeded,
    GriffinClient,
    InvalidArgument,
    Score,
)
from griffin_core.model.load import Model
from tests.servers import Running, eventually, running

MODES = ("generation", "classification")
CONTEXT = list(range(40, 70))
CHOICES = [[1, 2, 3], [4], list(range(90, 120))]


@pytest.fixture
def server(tiny: Callable[[str], Model]) -> Iterator[Running]:
    with running(tiny("llama"), role="all") as made:
        yield made


@pytest.fixture
def client(server: Running) -> Iterator[GriffinClient]:
    with server.client() as made:
        yield made


def same(ours: tuple[Score, ...], theirs: list[Score]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert [t.id for t in one.tokens] == [t.id for t in other.tokens]
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.logprob == pytest.approx(sum(t.logprob for t in one.tokens), abs=1e-4)
        assert (one.greedy, one.context_tokens) == (other.greedy, other.context_tokens)


@pytest.mark.parametrize("mode", MODES)
def test_choices_of_one_call_are_what_each_is_alone(mode: Any, client: GriffinClient) -> None:
    options: dict[str, Any] = {"mode": mode, "density": 0.5, "policy": "sampled", "seed": 3}
    scores = client.score_choices(CONTEXT, CHOICES, request_id="choices", **options)
    same(scores, [client.score(CONTEXT, one, **options) for one in CHOICES])
    assert {score.request_id for score in scores} == {"choices"}
    assert {score.context_tokens for score in scores} == {len(CONTEXT)}
    assert all(score.pruning == scores[0].pruning for score in scores)
    assert scores[0].pruning.experts_per_layer == 44
    texts = client.score_choices("the quick", (" brown", " red fox"), **options)
    same(texts, [client.score("the quick", one, **options) for one in (" brown", " red fox")])


def test_the_modes_differ_and_generation_is_the_default(client: GriffinClient) -> None:
    default, generation, classification = (
        client.score(CONTEXT, CHOICES[2], density=0.25, mode=mode)
        for mode in (None, "generation", "classification")
    )
    assert default.tokens == generation.tokens
    assert generation.logprob != pytest.approx(classification.logprob, abs=1e-2)
    dense = client.score(CONTEXT, CHOICES[2], density=1.0, mode="classification")
    ours, theirs = ([t.logprob for t in score.tokens] for score in (classification, dense))
    assert ours[:-1] == pytest.approx(theirs[:-1], abs=1e-5)
    assert dense.logprob == pytest.approx(client.score(CONTEXT, CHOICES[2]).logprob, abs=1e-4)


def test_an_answer_to_continuations_has_nothing_in_the_fields_of_one(server: Running) -> None:
    request = pb.ScoreRequest(
        context_token_ids=CONTEXT, continuations=[pb.Continuation(token_ids=c) for c in CHOICES]
    )
    with grpc.insecure_channel(server.target) as channel:
        response = generation_pb2_grpc.GenerationServiceStub(channel).Score(request)
    assert [[t.id for t in one.tokens] for one in response.continuations] == CHOICES
    assert (response.logprob, response.greedy, len(response.tokens)) == (0, False, 0)
    assert response.context_tokens == len(CONTEXT) and response.pruning.ff_width == 88


@pytest.mark.parametrize("policy", ["topk", "topk_sampled"])
@pytest.mark.parametrize("mode", MODES)
def test_two_servers_score_as_one(
    policy: Any, mode: Any, client: GriffinClient, tiny: Callable[[str], Model]
) -> None:
    """The prefill server reads the context, and the decode server what classification reads."""
    options: dict[str, Any] = {"mode": mode, "density": 0.5, "policy": policy, "seed": 5}
    with (
        running(tiny("llama"), role="prefill") as prefill,
        running(tiny("llama"), role="decode", prefill_target=prefill.target) as decode,
        decode.client() as split,
    ):
        same(
            split.score_choices(CONTEXT, CHOICES, **options),
            list(client.score_choices(CONTEXT, CHOICES, **options)),
        )
        assert split.score_choices([7, 8], [[9]], **options)[0].context_tokens == 2
        eventually(lambda: decode.app.engine.usage().result(10).kv_cache_bytes == 0)
        with pytest.raises(InvalidArgument, match="context_token_ids: got one token"):
            split.score([7], [9], mode="classification")


async def test_the_async_client_scores_choices_too(server: Running, client: GriffinClient) -> None:
    ours = client.score_choices(CONTEXT, CHOICES, mode="classification", density=0.5)
    async with AsyncGriffinClient(server.target) as other:
        theirs = await other.score_choices(CONTEXT, CHOICES, mode="classification", density=0.5)
        same(ours, list(theirs))
        with pytest.raises(InvalidArgument, match="continuation: got none"):
            await other.score_choices("a", [])


def test_the_client_refuses_what_is_no_mode_and_no_choices() -> None:
    with GriffinClient("localhost:1") as client:
        with pytest.raises(InvalidArgument, match=r"mode.*generation, classification"):
            client.score("a", "b", mode="paper")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="continuations"):
            client.score_choices("a", "b")
        with pytest.raises(InvalidArgument, match=r"continuations\[1\].token_ids"):
            client.score_choices([1], [[2], [-1]])


@pytest.mark.parametrize("mode", MODES)
def test_a_score_whose_caller_gives_up_leaves_nothing(mode: Any, server: Running) -> None:
    engine = server.app.engine
    with server.client() as client:
        with pytest.raises(DeadlineExceeded):
            client.score_choices([1, 2], [[3] * 250] * 256, mode=mode, density=0.5, timeout=0.2)
        eventually(lambda: engine.usage().result(10).kv_cache_bytes == 0)
        assert engine.sessions().result(10) == []
        assert len(client.score([1, 2], [3, 4], mode=mode).tokens) == 2
