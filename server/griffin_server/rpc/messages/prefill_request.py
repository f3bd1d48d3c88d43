"""The core's PrefillTask to PrefillRequest and back."""

from __future__ import annotations

from griffin.v1 import prefill_pb2 as pb
from griffin_core.engine.task import PrefillTask, check_token_ids
from griffin_core.errors import InvalidRequest
from griffin_core.experts.correction import CorrectionParams
from griffin_core.experts.selection import Selection
from griffin_core.spec.calibration import Calibration
from griffin_core.spec.model import ModelSpec
from griffin_server.rpc.messages.enums import (
    correction_from_pb,
    correction_to_pb,
    parameters_from_pb,
    parameters_to_pb,
    policy_from_pb,
    policy_to_pb,
)


def prefill_request(
    task: PrefillTask, fingerprint: str, calibration_digest: str, versions: tuple[int, int]
) -> pb.PrefillRequest:
    """The request for a prefill, without the offer of a transport.

    Args:
        fingerprint, calibration_digest: those of the model the prefill must run on.
        versions: the oldest and the newest version of the protocol that this side understands.
    """
    return pb.PrefillRequest(
        model_fingerprint=fingerprint,
        token_ids=task.token_ids,
        oldest_protocol_version=versions[0],
        newest_protocol_version=versions[1],
        selection=pb.ExpertSelection(
            policy=policy_to_pb(task.selection.policy),
            density=task.selection.density,
            seed=task.selection.seed,
            parameters=parameters_to_pb(task.selection.parameters),
            correction=correction_to_pb(task.selection.correction.kind),
            correction_rank=task.selection.correction.rank,
        ),
        calibration_digest=calibration_digest,
    )


def prefill_task(
    request: pb.PrefillRequest, spec: ModelSpec, calibration: Calibration | None = None
) -> PrefillTask:
    """The task of a request.

    Args:
        calibration: of the model.

    Raises:
        InvalidRequest: a field is out of range; the error names the field, value and range.
    """
    if not 1 <= len(request.token_ids) <= spec.context_length:
        raise InvalidRequest(
            "token_ids", f"{len(request.token_ids)} tokens", f"1 to {spec.context_length} tokens"
        )
    check_token_ids("token_ids", request.token_ids, spec)
    chosen = request.selection
    if not 0 < chosen.density <= 1:
        raise InvalidRequest("selection.density", chosen.density, "(0, 1]")
    policy = policy_from_pb("selection.policy", chosen.policy)
    try:
        selection = Selection(
            density=chosen.density,
            policy=policy or "topk",
            parameters=parameters_from_pb(chosen.parameters),
            correction=CorrectionParams(
                kind=correction_from_pb("pruning.correction", chosen.correction) or "none",
                rank=chosen.correction_rank,
            ),
            seed=chosen.seed,
        )
        selection.check(calibration)
    except InvalidRequest as error:  # which names the field of a GenerateRequest
        field = error.field.replace("pruning.", "selection.", 1)
        raise InvalidRequest(field, error.given, error.allowed) from error
    return PrefillTask(token_ids=tuple(request.token_ids), selection=selection)
