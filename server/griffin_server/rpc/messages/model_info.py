"""An engine and its model to GetModelInfoResponse."""

from __future__ import annotations

from griffin.v1 import generation_pb2 as pb
from griffin_core.engine.engine import Engine
from griffin_core.model.generation_config import SamplingDefaults
from griffin_server import __version__
from griffin_server.rpc.messages.enums import (
    correction_to_pb,
    policy_to_pb,
    sharing_to_pb,
    speculation_to_pb,
)


def model_info_to_pb(
    engine: Engine, role: str, sampling_defaults: SamplingDefaults
) -> pb.GetModelInfoResponse:
    """Describes an engine and its model.

    Args:
        role: "all" or "decode".
        sampling_defaults: values of the sampling fields that a request does not set.
    """
    model, spec = engine.model, engine.model.decoder.spec
    return pb.GetModelInfoResponse(
        model=model.name,
        family=spec.family,
        fingerprint=model.fingerprint,
        layers=len(spec.layers),
        width=spec.hidden_size,
        ff_width=spec.intermediate_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocabulary=spec.vocab_size,
        context_length=spec.context_length,
        dtype=str(model.decoder.dtype).removeprefix("torch."),
        device=str(model.decoder.device),
        role=role,
        has_chat_template=model.tokenizer.has_chat_template,
        default_density=engine.selection.density,
        default_policy=policy_to_pb(engine.selection.policy),
        default_sharing=sharing_to_pb(engine.sharing),
        max_sessions=engine.limits.max_sessions,
        version=__version__,
        default_sampling=sampling_defaults_to_pb(sampling_defaults),
        batch_invariant=engine.batch_invariant,
        default_correction=correction_to_pb(engine.selection.correction.kind),
        default_correction_rank=engine.selection.correction.rank,
        calibration_digest=model.decoder.calibration_digest,
        default_warmup_tokens=engine.selection.warmup_tokens,
        default_speculation=speculation_to_pb(engine.speculation),
        default_agreement_floor=engine.agreement_floor,
    )


def sampling_defaults_to_pb(defaults: SamplingDefaults) -> pb.Sampling:
    """A message that sets those fields that have a default."""
    return pb.Sampling(**defaults)  # type: ignore[arg-type]  # each has its field's type
