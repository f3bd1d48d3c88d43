"""GenerationService's messages: client dataclass -> message -> core task, and events back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from griffin.v1 import generation_pb2 as pb
from griffin.v1 import prefill_pb2 as pb_prefill
from griffin_client import requests, responses
from griffin_client import types as client_types
from griffin_core.engine import events
from griffin_core.engine.session import SessionInfo, State
from griffin_core.engine.task import GenerateTask, PrefillTask, PruningParams
from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.parameters import SelectionParameters
from griffin_core.experts.policies import POLICIES
from griffin_core.experts.selection import Selection
from griffin_core.model.load import Model
from griffin_core.sampling.bad_words import bad_words_ids
from griffin_core.sampling.logprobs import Logprobs
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.stopping import FinishReason, StoppingParams
from griffin_server.rpc.messages.enums import policy_from_pb, policy_to_pb
from griffin_server.rpc.messages.prefill_request import prefill_request, prefill_task
from griffin_server.rpc.messages.requests import generate_task
from griffin_server.rpc.messages.responses import (
    figures_to_pb,
    finished_to_pb,
    started_to_pb,
    tokens_to_pb,
)
from griffin_server.rpc.messages.sessions import session_to_pb
from griffin_server.transfer.protocol import NEWEST, OLDEST

FIGURES = events.PruningFigures(
    density=0.5,
    policy="sampled",
    expert_counts=(44, 44),
    ff_width=88,
    norm_mass=(0.5, 0.75, 1.0),
    slim_view_bytes=1000,
    kv_cache_bytes=2000,
    mean_density=0.625,
    dense_tokens=3,
)
TIMINGS = events.Timings(
    queue_s=1.0, prefill_s=2.0, selection_s=3.0, slim_build_s=4.0, first_token_s=5.0, decode_s=6.0
)


@pytest.fixture
def model(tiny: Callable[[str], Model]) -> Model:
    return tiny("llama")


def task_of(model: Model, request: pb.GenerateRequest) -> GenerateTask:
    return generate_task(request, model.tokenizer, model.decoder.spec)


def over_the_wire(message: pb.GenerateResponse) -> pb.GenerateResponse:
    return pb.GenerateResponse.FromString(message.SerializeToString())


def test_everything_the_client_sets_reaches_the_task(model: Model) -> None:
    request = requests.generate_request(
        "generate",
        None,
        {
            "token_ids": [1, 2, 3],
            "density": 0.25,
            "policy": "topk_sampled",
            "sharing": "shared",
            "temperature": 0.5,
            "top_k": 7,
            "top_p": 0.75,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.25,
            "seed": 2**63 + 1,
            "logit_bias": {5: -1.5},
            "bad_words": ["bad"],
            "allowed_token_ids": [1, 5, 7],
            "max_tokens": 9,
            "stop": ["a", "é"],
            "stop_token_ids": [3],
            "ignore_eos": True,
            "min_tokens": 2,
            "include_stop_string": True,
            "skip_special_tokens": False,
            "top_logprobs": 0,
            "session_id": "s",
            "keep_session": True,
            "request_id": "r",
        },
    )
    task = task_of(model, pb.GenerateRequest.FromString(request.SerializeToString()))
    assert task == GenerateTask(
        prompt=(1, 2, 3),
        sampling=SamplingParams(
            temperature=0.5,
            top_k=7,
            top_p=0.75,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.25,
            seed=2**63 + 1,
            logit_bias={5: -1.5},
            bad_words_ids=bad_words_ids(["bad"], model.tokenizer),
            allowed_token_ids=frozenset([1, 5, 7]),
        ),
        stopping=StoppingParams(
            max_tokens=9,
            stop=("a", "é"),
            stop_token_ids=frozenset([3]),
            ignore_eos=True,
            min_tokens=2,
            include_stop_string=True,
            skip_special_tokens=False,
        ),
        pruning=PruningParams(density=0.25, policy="topk_sampled", sharing="shared"),
        top_logprobs=0,
        continues="s",
        keep=True,
        turn_id=task.turn_id,
    )


def test_what_the_client_leaves_open_takes_the_cores_defaults(model: Model) -> None:
    task = task_of(model, pb.GenerateRequest(text="ab"))
    assert task.prompt == tuple(model.tokenizer.encode("ab"))
    assert task.sampling == SamplingParams(seed=task.sampling.seed)
    assert task.stopping == StoppingParams()
    assert task.pruning == PruningParams()
    assert (task.top_logprobs, task.continues, task.keep) == (None, None, False)


def test_without_a_seed_each_request_draws_its_own(model: Model) -> None:
    request = pb.GenerateRequest(text="ab")
    assert task_of(model, request).sampling.seed != task_of(model, request).sampling.seed


def test_messages_are_rendered_by_the_models_template(model: Model) -> None:
    messages = [pb.ChatMessage(role="user", content="hi")]
    task = task_of(model, pb.GenerateRequest(messages=messages))
    assert model.tokenizer.decode(task.prompt) == "<user>hi\n<assistant>"


def test_the_parameters_of_a_policy_survive_the_way_to_decode_and_on_to_prefill(
    model: Model,
) -> None:
    options = {"policy": "topk_sampled", "topk_share": 0.25, "density": 0.5}
    task = task_of(model, requests.generate_request("complete", "ab", options))
    selection = task.pruning.selection(Selection(density=1.0), seed=3)
    assert selection.parameters == SelectionParameters(topk_share=0.25)
    asked = prefill_request(
        PrefillTask(token_ids=(1, 2), selection=selection), model.fingerprint, "", (OLDEST, NEWEST)
    )
    assert prefill_task(asked, model.decoder.spec).selection == selection


def test_a_later_turn_keeps_the_parameters_while_it_keeps_the_policy(model: Model) -> None:
    base = Selection(
        density=0.5, policy="topk_sampled", parameters=SelectionParameters(topk_share=0.25)
    )

    def later(**options: Any) -> Selection:
        return task_of(
            model, requests.generate_request("complete", "ab", options)
        ).pruning.selection(base, 0)

    assert later(density=0.3).parameters == base.parameters
    assert later(topk_share=0.75).parameters == SelectionParameters(topk_share=0.75)
    assert later(policy="topk").parameters == SelectionParameters()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_survives_the_way_there_and_back(policy: str) -> None:
    number = policy_to_pb(policy)  # type: ignore[arg-type]
    assert number != pb.SELECTION_POLICY_UNSPECIFIED
    assert policy_from_pb("policy", number) == policy
    figures = figures_to_pb(FIGURES)
    figures.policy = number
    assert responses.figures(figures).policy == policy


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefill_task_survives_the_way_to_a_prefill_server(policy: str, model: Model) -> None:
    selection = Selection(
        density=0.25,
        policy=policy,  # type: ignore[arg-type]
        correction=CorrectionParams(kind="residual", rank=17),
        seed=2**63 + 1,
    )
    task = PrefillTask(token_ids=(1, 2, 3), selection=selection)
    digest = model.decoder.calibration_digest
    request = prefill_request(task, model.fingerprint, digest, (OLDEST, NEWEST))
    assert request.calibration_digest == digest != ""
    assert request.model_fingerprint == model.fingerprint
    received = pb_prefill.PrefillRequest.FromString(request.SerializeToString())
    calibration = model.decoder.calibration
    assert prefill_task(received, model.decoder.spec, calibration) == task


def test_started_reaches_the_client_whole() -> None:
    event = events.Started(
        session_id="s", prompt_tokens=3, prefill_s=0.5, selection_s=0.1, pruning=FIGURES
    )
    received = responses.event(over_the_wire(started_to_pb(event, "r")))
    assert isinstance(received, client_types.Started)
    assert (received.session_id, received.request_id) == ("s", "r")
    assert (received.prompt_tokens, received.prefill_s) == (3, 0.5)
    derived = {"mean_norm_mass": 0.75, "experts_per_layer": 44}
    assert received.pruning.__dict__ == {**FIGURES.__dict__, **derived}


def test_tokens_reach_the_client_whole(model: Model) -> None:
    event = events.TokensMade(
        ids=(65, 66), text="é", logprobs=(Logprobs(chosen=-0.5, top=((65, -0.5), (66, -1.0))),) * 2
    )
    received = responses.event(over_the_wire(tokens_to_pb(event, model.tokenizer)))
    assert isinstance(received, client_types.Tokens)
    assert (received.ids, received.text) == ((65, 66), "é")
    assert [item.logprob for item in received.logprobs] == [-0.5, -0.5]
    assert [(top.id, top.logprob) for top in received.logprobs[0].top] == [(65, -0.5), (66, -1.0)]
    assert received.logprobs[0].top[0].text == model.tokenizer.decode([65])


DRAFTED = events.SpeculationFigures(
    lookup_drafted=8, lookup_accepted=5, slim_drafted=4, slim_accepted=1
)


@pytest.mark.parametrize("reason", FinishReason)
def test_finished_reaches_the_client_whole(reason: FinishReason) -> None:
    event = events.Finished(
        reason=reason,
        stop="x",
        prompt_tokens=1,
        generated_tokens=2,
        context_tokens=3,
        timings=TIMINGS,
        pruning=FIGURES,
        speculation=DRAFTED,
        kept=True,
    )
    received = responses.event(over_the_wire(finished_to_pb(event)))
    assert isinstance(received, client_types.Finished)
    assert received.reason == reason.name.lower()
    assert received.usage == client_types.Usage(
        prompt_tokens=1, generated_tokens=2, context_tokens=3
    )
    assert received.timings.__dict__ == TIMINGS.__dict__
    assert received.speculation.__dict__ == DRAFTED.__dict__
    assert (received.stop, received.session_kept) == ("x", True)


@pytest.mark.parametrize("state", State)
def test_a_session_reaches_the_client_whole(state: State) -> None:
    info = SessionInfo(
        session_id="s",
        owner="alice",
        state=state,
        context_tokens=1,
        generated_tokens=2,
        age_s=3.0,
        idle_s=4.0,
        reserved_bytes=5,
        pruning=FIGURES,
    )
    received = responses.session(session_to_pb(info))
    assert received.state == state.name.lower()
    assert (received.context_tokens, received.generated_tokens) == (1, 2)
    assert (received.age_s, received.idle_s) == (3.0, 4.0)
    assert received.owner == "alice"
