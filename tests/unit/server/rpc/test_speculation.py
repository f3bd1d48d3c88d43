"""Speculation and warm-up as a client sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from pydantic import ValidationError

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import generation_pb2_grpc
from griffin_client import Completion, InvalidArgument
from griffin_core.model.load import Model
from griffin_server.settings import Settings
from tests.servers import Running, running

FEW: dict[str, Any] = {"allowed_token_ids": [20, 21], "max_tokens": 60, "ignore_eos": True}
"""What is drawn from two tokens soon repeats itself."""


def complete(server: Running, **options: Any) -> Completion:
    with server.client() as client:
        return client.complete("a b a b", **{**FEW, **options})


def drafted(completion: Completion) -> dict[str, int]:
    return vars(completion.finished.speculation)


def value_of(server: Running, name: str, **labels: str) -> float:
    return server.app.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("seed", [None, 3])
def test_a_lookup_changes_no_token_and_is_counted(tiny_server: Running, seed: int | None) -> None:
    sampling = {} if seed is None else {"seed": seed, "temperature": 0.7}
    before = value_of(tiny_server, "griffin_accepted_tokens_total", source="lookup")
    plain = complete(tiny_server, **sampling)
    fast = complete(tiny_server, speculation="lookup", **sampling)
    assert (fast.token_ids, fast.text) == (plain.token_ids, plain.text)
    assert set(drafted(plain).values()) == {0}
    figures = drafted(fast)
    assert 0 < figures["lookup_accepted"] <= figures["lookup_drafted"]
    assert figures["slim_drafted"] == 0
    after = value_of(tiny_server, "griffin_accepted_tokens_total", source="lookup")
    assert after - before == figures["lookup_accepted"]


def test_the_slim_view_drafts_what_all_neurons_verify(tiny_server: Running) -> None:
    dense = complete(tiny_server, density=1.0)
    fast = complete(tiny_server, density=0.5, sharing="private", speculation="slim", draft_tokens=5)
    assert fast.token_ids == dense.token_ids
    assert fast.finished.pruning.mean_density == 1
    assert drafted(fast)["slim_drafted"] > 0


def test_a_warm_up_is_dense(tiny_server: Running) -> None:
    some = complete(tiny_server, density=0.5, sharing="private", warmup_tokens=20)
    prompt = some.finished.usage.prompt_tokens
    assert some.finished.pruning.dense_tokens == 1 + 20 - prompt
    assert 0.5 < some.finished.pruning.mean_density < 1


def test_checks_measure_agreement(tiny_server: Running) -> None:
    before = value_of(tiny_server, "griffin_agreed_tokens_total")
    options: dict[str, Any] = {"density": 0.5, "sharing": "private"}
    checked = complete(tiny_server, checks=True, **options).finished.pruning
    assert 0 < checked.checked_tokens <= 60 and checked.checked_tokens % 32 == 0
    assert checked.agreement == checked.agreed_tokens / checked.checked_tokens
    after = value_of(tiny_server, "griffin_agreed_tokens_total")
    assert after - before == checked.agreed_tokens
    assert complete(tiny_server, **options).finished.pruning.agreement is None


def test_a_floor_sets_the_density(tiny_server: Running) -> None:
    done = complete(tiny_server, agreement_floor=0.6, sharing="private", warmup_tokens=0)
    figures = done.finished.pruning
    assert figures.agreement_floor == 0.6 and figures.density in (1.0, 0.75, 0.5)
    assert figures.checked_tokens >= 32
    plain = complete(tiny_server, density=0.5).finished.pruning
    assert plain.agreement_floor is None


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (pb.Pruning(warmup_tokens=8), "pruning.warmup_tokens: got 8"),
        (pb.Pruning(checks=True), "pruning.checks: got True"),
        (pb.Pruning(agreement_floor=0.5), "pruning.agreement_floor: got 0.5"),
    ],
)
def test_a_score_and_an_analysis_have_neither(
    pruning: pb.Pruning, message: str, tiny_server: Running
) -> None:
    score = pb.ScoreRequest(context="a b", continuation=" c", pruning=pruning)
    analysis = pb.AnalyzePromptRequest(text="a b", pruning=pruning)
    with grpc.insecure_channel(tiny_server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="pruning") as one:
            stub.Score(score)
        with pytest.raises(grpc.RpcError, match="pruning") as other:
            list(stub.AnalyzePrompt(analysis))
    for caught in (one, other):
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert message in caught.value.details()


def test_a_server_has_defaults_that_a_request_overrides(tiny: Callable[[str], Model]) -> None:
    with running(
        tiny("llama"), speculation="lookup", warmup_tokens=12, density=0.5, sharing="private"
    ) as server:
        with server.client() as client:
            info = client.model_info()
        assert (info.default_speculation, info.default_warmup_tokens) == ("lookup", 12)
        by_default = complete(server)
        assert drafted(by_default)["lookup_drafted"] > 0
        warm = by_default.finished.pruning.dense_tokens
        assert warm >= 1 + 12 - by_default.finished.usage.prompt_tokens
        other = complete(server, speculation="off", warmup_tokens=0)
        assert drafted(other)["lookup_drafted"] == 0
        assert other.finished.pruning.dense_tokens == 1


def test_a_batch_invariant_server_refuses_drafts(tiny: Callable[[str], Model]) -> None:
    with (
        running(tiny("llama"), batch_invariant=True) as server,
        pytest.raises(InvalidArgument, match="off on a server with --batch-invariant"),
    ):
        complete(server, speculation="auto")
    with pytest.raises(ValidationError, match="got lookup with batch_invariant; allowed: off"):
        Settings(batch_invariant=True, speculation="lookup")
