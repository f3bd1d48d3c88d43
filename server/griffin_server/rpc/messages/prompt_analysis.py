"""AnalyzePrompt's messages: a request to a prefill, and its events to messages."""

from __future__ import annotations

from collections.abc import Iterator

from griffin.v1 import generation_pb2 as pb
from griffin_core.decode.task import check_token_ids
from griffin_core.errors import InvalidRequest
from griffin_core.experts.expert_set import ExpertSet, pack_indices
from griffin_core.experts.selection import Selection
from griffin_core.model.load import Model
from griffin_core.model.spec import ModelSpec
from griffin_core.model.tokenizer import Tokenizer
from griffin_core.prefill import LayerActivations, LayerExperts, prefill
from griffin_core.prefill_queue import PrefillTask
from griffin_server.rpc.messages.requests import input_field, prompt_ids, pruning_params, seed_of
from griffin_server.transfer.codec import pack_floats

MAX_WATCHED = 8
"""Layers a call may ask activations of: T x F numbers each."""

MAX_VALUES_BYTES = 1 << 20


def analyze_task(
    request: pb.AnalyzePromptRequest,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    timeout_s: float | None = None,
    *,
    base: Selection,
) -> PrefillTask:
    """Tokenizes and checks a request.

    Args:
        timeout_s: of no interest: the call's end ends the work.
        base: what the request leaves open.

    Raises:
        InvalidRequest: naming field, value and range.
    """
    field = input_field(request)
    pruning = pruning_params(request.pruning)
    if pruning.sharing is not None:
        raise InvalidRequest("pruning.sharing", pruning.sharing, "nothing: no session is made")
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
    return PrefillTask(
        token_ids=tuple(prompt),
        selection=pruning.selection(base, seed_of(request)),
        wants_kv=False,
        watch=frozenset(layers),
        most_begun=1,  # no reservation covers its cache
    )


def started_to_pb(
    task: PrefillTask, tokenizer: Tokenizer, spec: ModelSpec, request_id: str
) -> pb.AnalyzePromptResponse:
    return pb.AnalyzePromptResponse(
        started=pb.AnalyzePromptResponse.Started(
            token_ids=task.token_ids,
            texts=[tokenizer.decode_one(token) for token in task.token_ids],
            experts_per_layer=task.selection.experts_of(spec.ff_width),
            ff_width=spec.ff_width,
            request_id=request_id,
        )
    )


def event_to_pb(event: LayerActivations | LayerExperts) -> list[pb.AnalyzePromptResponse]:
    """The messages of an event; activations are cut into several."""
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
    experts = ExpertSet(ff_width=event.s.shape[0], indices=event.experts[None])
    (norm_mass,) = experts.norm_mass(event.s.square()[None])
    layer = pb.AnalyzePromptResponse.Layer(
        layer=event.layer,
        s=pack_floats(event.s),
        experts=pack_indices(event.experts),
        norm_mass=norm_mass,
    )
    return [pb.AnalyzePromptResponse(layer=layer)]


def analyze_here(
    model: Model, request: pb.AnalyzePromptRequest, base: Selection
) -> Iterator[pb.AnalyzePromptResponse]:
    """What AnalyzePrompt streams, of a model in this process.

    Raises:
        InvalidRequest: naming field, value and range.
    """
    decoder, tokenizer = model.decoder, model.tokenizer
    task = analyze_task(request, tokenizer, decoder.spec, base=base)
    yield started_to_pb(task, tokenizer, decoder.spec, request.request_id)
    for event in prefill(decoder, task.token_ids, task.selection, watch=task.watch):
        if isinstance(event, LayerActivations | LayerExperts):
            yield from event_to_pb(event)
