"""GenerateRequest to the core's GenerateTask."""

from __future__ import annotations

import time

from griffin.v1 import generation_pb2 as pb
from griffin_core.engine.task import GenerateTask, PruningParams
from griffin_core.model.generation_config import NO_SAMPLING_DEFAULTS, SamplingDefaults
from griffin_core.sampling.bad_words import bad_words_ids
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.speculation import SpeculationParams
from griffin_core.sampling.stopping import StoppingParams
from griffin_core.spec.model import ModelSpec
from griffin_core.text.tokenizer import Tokenizer
from griffin_server.rpc.messages.enums import (
    correction_from_pb,
    parameters_from_pb,
    policy_from_pb,
    sharing_from_pb,
    speculation_from_pb,
    verify_from_pb,
)
from griffin_server.rpc.messages.fields import seed_of, set_fields
from griffin_server.rpc.messages.prompts import input_field, prompt_ids


def generate_task(
    request: pb.GenerateRequest,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    timeout_s: float | None = None,
    *,
    sampling_defaults: SamplingDefaults = NO_SAMPLING_DEFAULTS,
) -> GenerateTask:
    """Tokenizes and checks a request.

    Args:
        timeout_s: seconds until the call's deadline; None without one.
        sampling_defaults: values of the sampling fields that the request does not set.

    Raises:
        InvalidRequest: a field is out of range; the error names the field, value and range.
    """
    arrived = time.monotonic()
    field = input_field(request)
    seed = seed_of(request.sampling)
    # These are cheap to check, so they are checked before the prompt is tokenized.
    sampling = _sampling(request.sampling, seed, sampling_defaults, tokenizer)
    stopping = _stopping(request.stopping)
    pruning = pruning_params(request.pruning)
    speculation = _speculation(request)
    prompt = prompt_ids(field, request, tokenizer, spec, continues=bool(request.session_id))
    task = GenerateTask(
        prompt=tuple(prompt),
        sampling=sampling,
        stopping=stopping,
        pruning=pruning,
        speculation=speculation,
        top_logprobs=request.top_logprobs if request.HasField("top_logprobs") else None,
        continues=request.session_id or None,
        keep=request.keep_session,
        arrived=arrived,
        deadline=None if timeout_s is None else arrived + timeout_s,
    )
    task.check(spec, field)
    return task


def pruning_params(message: pb.Pruning) -> PruningParams:
    own = message.HasField("parameters")
    return PruningParams(
        parameters=parameters_from_pb(message.parameters) if own else None,
        policy=policy_from_pb("pruning.policy", message.policy),
        sharing=sharing_from_pb("pruning.sharing", message.sharing),
        correction=correction_from_pb("pruning.correction", message.correction),
        **set_fields(
            message, "density", "correction_rank", "warmup_tokens", "checks", "agreement_floor"
        ),
    )


def _speculation(request: pb.GenerateRequest) -> SpeculationParams:
    return SpeculationParams(
        mode=speculation_from_pb("speculation", request.speculation),
        verify=verify_from_pb("verify", request.verify),
        **set_fields(request, "draft_tokens"),
    )


def _sampling(
    message: pb.Sampling, seed: int, defaults: SamplingDefaults, tokenizer: Tokenizer
) -> SamplingParams:
    values = set_fields(
        message,
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    )
    return SamplingParams(
        seed=seed,
        logit_bias=dict(message.logit_bias),
        bad_words_ids=bad_words_ids(message.bad_words, tokenizer),
        allowed_token_ids=frozenset(message.allowed_token_ids),
        **{**defaults, **values},
    )


def _stopping(message: pb.Stopping) -> StoppingParams:
    return StoppingParams(
        stop=tuple(message.stop),
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop_string=message.include_stop_string,
        **set_fields(message, "max_tokens", "min_tokens", "skip_special_tokens"),
    )
