"""Names of the core (policies, sharings, modes, reasons, states) to enums of the wire and back, and
the parameters of selections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TypeVar

from griffin.v1 import generation_pb2 as pb
from griffin_core.engine.session import State
from griffin_core.errors import InvalidRequest
from griffin_core.experts.parameters import SelectionParameters
from griffin_core.experts.policies import PolicyName
from griffin_core.sampling.stopping import FinishReason
from griffin_core.spec.choices import CorrectionKind, ScoreMode, Sharing, SpeculationMode, Verify
from griffin_server.rpc.messages.fields import set_fields

N = TypeVar("N", bound=str)

_POLICIES: dict[PolicyName, pb.SelectionPolicy.ValueType] = {
    "topk": pb.SELECTION_POLICY_TOPK,
    "sampled": pb.SELECTION_POLICY_SAMPLED,
    "topk_sampled": pb.SELECTION_POLICY_TOPK_SAMPLED,
    "magnitude": pb.SELECTION_POLICY_MAGNITUDE,
    "random": pb.SELECTION_POLICY_RANDOM,
    "sensitive": pb.SELECTION_POLICY_SENSITIVE,
    "topk_budgets": pb.SELECTION_POLICY_TOPK_BUDGETS,
}

_CORRECTIONS: dict[CorrectionKind, pb.Correction.ValueType] = {
    "none": pb.CORRECTION_NONE,
    "bias": pb.CORRECTION_BIAS,
    "residual": pb.CORRECTION_RESIDUAL,
}

_SHARINGS: dict[Sharing, pb.ExpertSharing.ValueType] = {
    "private": pb.EXPERT_SHARING_PRIVATE,
    "shared": pb.EXPERT_SHARING_SHARED,
    "auto": pb.EXPERT_SHARING_AUTO,
}

_SPECULATIONS: dict[SpeculationMode, pb.SpeculationMode.ValueType] = {
    "off": pb.SPECULATION_MODE_OFF,
    "lookup": pb.SPECULATION_MODE_LOOKUP,
    "slim": pb.SPECULATION_MODE_SLIM,
    "auto": pb.SPECULATION_MODE_AUTO,
}

_VERIFICATIONS: dict[Verify, pb.Verification.ValueType] = {
    "dense": pb.VERIFICATION_DENSE,
    "experts": pb.VERIFICATION_EXPERTS,
}

_SCORE_MODES: dict[ScoreMode, pb.ScoreMode.ValueType] = {
    "generation": pb.SCORE_MODE_GENERATION,
    "classification": pb.SCORE_MODE_CLASSIFICATION,
}

REASONS_TO_PB = {
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT_LENGTH: pb.FINISH_REASON_CONTEXT_LENGTH,
}

STATES_TO_PB = {
    State.QUEUED: pb.SESSION_STATE_QUEUED,
    State.PREFILL: pb.SESSION_STATE_PREFILL,
    State.DECODE: pb.SESSION_STATE_DECODE,
    State.IDLE: pb.SESSION_STATE_IDLE,
}


def policy_to_pb(policy: PolicyName) -> pb.SelectionPolicy.ValueType:
    return _POLICIES[policy]


def policy_from_pb(field: str, value: int) -> PolicyName | None:
    """The policy with a number; None for UNSPECIFIED.

    Raises:
        InvalidRequest: no policy has the number.
    """
    return _name_of(_POLICIES, field, value)


def parameters_from_pb(message: pb.SelectionParameters) -> SelectionParameters:
    """The parameters that a message sets; they have the same names in the core.

    Raises:
        InvalidRequest: a value is out of range.
    """
    names = (each.name for each in fields(SelectionParameters))
    return SelectionParameters(**set_fields(message, *names))


def parameters_to_pb(parameters: SelectionParameters) -> pb.SelectionParameters:
    return pb.SelectionParameters(**asdict(parameters))


def correction_to_pb(kind: CorrectionKind) -> pb.Correction.ValueType:
    return _CORRECTIONS[kind]


def correction_from_pb(field: str, value: int) -> CorrectionKind | None:
    """As ``policy_from_pb``."""
    return _name_of(_CORRECTIONS, field, value)


def sharing_to_pb(sharing: Sharing) -> pb.ExpertSharing.ValueType:
    return _SHARINGS[sharing]


def sharing_from_pb(field: str, value: int) -> Sharing | None:
    """As ``policy_from_pb``."""
    return _name_of(_SHARINGS, field, value)


def speculation_to_pb(mode: SpeculationMode) -> pb.SpeculationMode.ValueType:
    return _SPECULATIONS[mode]


def speculation_from_pb(field: str, value: int) -> SpeculationMode | None:
    """As ``policy_from_pb``."""
    return _name_of(_SPECULATIONS, field, value)


def verify_from_pb(field: str, value: int) -> Verify | None:
    """As ``policy_from_pb``."""
    return _name_of(_VERIFICATIONS, field, value)


def score_mode_from_pb(field: str, value: int) -> ScoreMode | None:
    """As ``policy_from_pb``."""
    return _name_of(_SCORE_MODES, field, value)


def _name_of(numbers: Mapping[N, int], field: str, value: int) -> N | None:
    if value == 0:  # UNSPECIFIED
        return None
    for name, number in numbers.items():
        if number == value:
            return name
    allowed = ", ".join(f"{number} ({name})" for name, number in numbers.items())
    raise InvalidRequest(field, value, allowed)
