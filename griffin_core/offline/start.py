"""The engine that an ``LLM`` runs on, from the arguments that it was given."""

from __future__ import annotations

from typing import cast

import torch

from griffin_core.engine.cpu_share import CpuShare
from griffin_core.engine.engine import Engine
from griffin_core.engine.limits import Limits
from griffin_core.engine.task import PruningParams
from griffin_core.errors import InvalidRequest
from griffin_core.experts.selection import default_selection
from griffin_core.model.hub import Progress
from griffin_core.model.load import DTYPES, Model, load_model
from griffin_core.offline.checks import check
from griffin_core.sampling.speculation import SpeculationParams
from griffin_core.spec.choices import CorrectionKind, PolicyName, Sharing, SpeculationMode


def make_engine(
    model: str | Model,
    *,
    dtype: str | torch.dtype | None,
    device: str,
    allow_pickle: bool,
    density: float,
    policy: PolicyName | None,
    correction: CorrectionKind | None,
    correction_rank: int | None,
    sharing: Sharing,
    warmup_tokens: int,
    speculation: SpeculationMode,
    threads: int | None,
    batch_invariant: bool,
    max_sessions: int,
    memory_fraction: float | None,
    progress: Progress | None,
) -> Engine:
    """Loads a model and makes an engine for offline batches, which is not started yet. The
    arguments are those of ``LLM``.

    Raises:
        GriffinError: see ``LLM``.
    """
    PruningParams(  # checks them
        density=density,
        policy=policy,
        sharing=sharing,
        correction=correction,
        correction_rank=correction_rank,
        warmup_tokens=warmup_tokens,
    )
    SpeculationParams(mode=speculation)
    check("threads", threads, threads is None or threads >= 1, ">= 1, or None")
    check("max_sessions", max_sessions, max_sessions >= 1, ">= 1")
    in_range = memory_fraction is None or 0 < memory_fraction <= 1
    check("memory_fraction", memory_fraction, in_range, "(0, 1], or None")
    if isinstance(model, Model):
        check("dtype", dtype, dtype is None, "None with a model that is loaded")
        check("device", device, device == "auto", "auto with a model that is loaded")
    else:
        progress = progress or (lambda _: None)
        model = load_model(
            model,
            dtype=_dtype(dtype),
            device=device,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    return Engine(
        model,
        limits=Limits(
            max_sessions=max_sessions,
            max_queue=2**31,  # each call submits a bounded number
            memory_fraction=memory_fraction,
            chunk_tokens=model.decoder.backend.default_chunk_tokens,
            prefill_share=1.0,  # no stream waits: the sooner a step has all its rows, the better
        ),
        selection=default_selection(
            density,
            policy=policy,
            correction=correction,
            rank=correction_rank,
            warmup_tokens=warmup_tokens,
            calibration=model.decoder.calibration,
        ),
        sharing=sharing,
        speculation=speculation,
        costs=None,
        batch_invariant=batch_invariant,
        threads=threads or CpuShare(),
    )


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    if given is None or given in DTYPES.values():
        return cast(torch.dtype | None, given)
    if given not in DTYPES:
        raise InvalidRequest("dtype", str(given), f"{', '.join(DTYPES)}, or None")
    return DTYPES[given]
