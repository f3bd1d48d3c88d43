"""The core's PrefillTask to PrefillRequest and back."""

from __future__ import annotations

from griffin.v1 import prefill_pb2 as pb
from griffin_core.engine.task import PrefillTask, check_token_ids
from griffin_core.errors import InvalidRequest
from griffin_core.experts.selection import Selection
from griffin_core.spec.model import ModelSpec
from griffin_server.rpc.messages.enums import policy_from_pb, policy_to_pb


def prefill_request(task: PrefillTask, fingerprint: str) -> pb.PrefillRequest:
    """The request for a prefill, without the offer of a transport.

    Args:
        fingerprint: that of the model the prefill must run on.
    """
    return pb.PrefillRequest(
        model_fingerprint=fingerprint,
        token_ids=task.token_ids,
        density=task.selection.density,
        policy=policy_to_pb(task.selection.policy),
        seed=task.selection.seed,
    )


def prefill_task(request: pb.PrefillRequest, spec: ModelSpec) -> PrefillTask:
    """The task of a request.

    Raises:
        InvalidRequest: a field is out of range; the error names the field, value and range.
    """
    if not 1 <= len(request.token_ids) <= spec.context_length:
        raise InvalidRequest(
            "token_ids", f"{len(request.token_ids)} tokens", f"1 to {spec.context_length} tokens"
        )
    check_token_ids("token_ids", request.token_ids, spec)
    if not 0 < request.density <= 1:
        raise InvalidRequest("density", request.density, "(0, 1]")
    policy = policy_from_pb("policy", request.policy)
    return PrefillTask(
        token_ids=tuple(request.token_ids),
        selection=Selection(density=request.density, policy=policy or "topk", seed=request.seed),
    )
