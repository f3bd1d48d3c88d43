"""AnalyzePromptRequest to the core's PrefillTask, and its events to AnalyzePromptResponse."""

from __future__ import annotations

from dataclasses import replace

from griffin.v1 import generation_pb2 as pb
from griffin_core.engine.task import PrefillTask, check_token_ids
from griffin_core.errors import InvalidRequest
from griffin_core.experts.correction import NO_CORRECTION
from griffin_core.experts.expert_set import pack_indices
from griffin_core.experts.selection import Selection
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.forward.events import (
    LayerActivations,
    LayerExperts,
)
from griffin_core.spec.calibration import Calibration
from griffin_core.spec.choices import CALIBRATED_POLICIES
from griffin_core.spec.model import ModelSpec
from griffin_core.text.tokenizer import Tokenizer
from griffin_server.rpc.messages.fields import seed_of
from griffin_server.rpc.messages.prompts import input_field, prompt_ids
from griffin_server.rpc.messages.requests import pruning_params
from griffin_server.rpc.messages.tensors import pack_floats

MAX_WATCHED = 8
"""The most layers whose activations a call may ask for, [T, F] numbers each."""

MAX_VALUES_BYTES = 1 << 20
"""The most bytes of activations in one message, unless a single token's are more."""


def analyze_task(
    request: pb.AnalyzePromptRequest,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    timeout_s: float | None = None,
    *,
    base: Selection,
    calibration: Calibration | None = None,
) -> PrefillTask:
    """Tokenizes and checks a request.

    Args:
        timeout_s: ignored, because the work ends with the call.
        base: the selection of a request that sets none of its fields.
        calibration: of the model.

    Raises:
        InvalidRequest: a field is out of range; the error names the field, value and range.
    """
    field = input_field(request)
    pruning = pruning_params(request.pruning)
    if pruning.sharing is not None:
        raise InvalidRequest("pruning.sharing", pruning.sharing, "nothing: no session is made")
    if warmup := pruning.warmup_tokens:
        raise InvalidRequest("pruning.warmup_tokens", warmup, "0: nothing is generated")
    if pruning.agreement_floor is not None:
        floor = pruning.agreement_floor
        raise InvalidRequest("pruning.agreement_floor", floor, "none: nothing is generated")
    if pruning.checks:
        raise InvalidRequest("pruning.checks", True, "false: nothing is generated")
    layers = request.activation_layers
    if len(layers) > MAX_WATCHED:
        raise InvalidRequest("activation_layers", f"{len(layers)} layers", f"up to {MAX_WATCHED}")
    for index, layer in enumerate(layers):
        if layer >= len(spec.layers):
            raise InvalidRequest(
                f"activation_layers[{index}]", layer, f"[0, {len(spec.layers)}), the layers"
            )
    prompt = prompt_ids(field, request, tokenizer, spec)
    check_token_ids(field, prompt, spec)
    selection = pruning.selection(base, seed_of(request))
    selection.check(calibration)
    return PrefillTask(
        token_ids=tuple(prompt),
        selection=replace(selection, correction=NO_CORRECTION),  # nothing is generated
        wants_kv=False,
        watch=frozenset(layers),
        max_concurrent=1,  # because no reservation covers its KV cache
    )


def started_to_pb(
    task: PrefillTask, tokenizer: Tokenizer, spec: ModelSpec, request_id: str
) -> pb.AnalyzePromptResponse:
    count = task.selection.count(spec.intermediate_size)
    known = task.selection.policy not in CALIBRATED_POLICIES
    return pb.AnalyzePromptResponse(
        started=pb.AnalyzePromptResponse.Started(
            token_ids=task.token_ids,
            texts=[tokenizer.decode_one(token) for token in task.token_ids],
            experts_per_layer=count,
            expert_counts=[count] * len(spec.layers) if known else [],
            ff_width=spec.intermediate_size,
            request_id=request_id,
        )
    )


def event_to_pb(event: LayerActivations | LayerExperts) -> list[pb.AnalyzePromptResponse]:
    """The messages of an event. Activations are split over several."""
    if isinstance(event, LayerActivations):
        tokens, width = event.values.shape
        rows = max(1, MAX_VALUES_BYTES // (4 * width))
        return [
            pb.AnalyzePromptResponse(
                activations=pb.AnalyzePromptResponse.Activations(
                    layer=event.layer,
                    first_token=event.first_token + begin,
                    values=pack_floats(event.values[begin : begin + rows]),
                )
            )
            for begin in range(0, tokens, rows)
        ]
    slim = SlimSpec.of_layers(event.s2.shape[0], [event.experts])
    (norm_mass,) = slim.norm_mass(event.s2[None])
    layer = pb.AnalyzePromptResponse.Layer(
        layer=event.layer,
        s=pack_floats(event.s2.sqrt()),
        experts=pack_indices(event.experts),
        norm_mass=norm_mass,
    )
    return [pb.AnalyzePromptResponse(layer=layer)]
