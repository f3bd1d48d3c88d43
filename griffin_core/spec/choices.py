"""The names that settings and requests choose from. Imports no torch, so that settings load
fast."""

from __future__ import annotations

from typing import Literal, get_args

DEFAULT_MODEL = "smollm2-135m-instruct"

PolicyName = Literal[
    "topk", "sampled", "topk_sampled", "magnitude", "random", "sensitive", "topk_budgets"
]

CALIBRATED_POLICIES: tuple[PolicyName, ...] = ("sensitive", "topk_budgets")
"""Policies that read a model's calibration."""

CorrectionKind = Literal["none", "bias", "residual"]
"""What is added to the FF's output in place of the neurons that are left out. bias: their mean
output. residual: a linear map of rank r of the FF's input, and the mean."""

DEFAULT_RANK, MAX_RANK = 64, 256
"""Ranks of a residual: of requests that name none, and the highest."""

MAX_WARMUP = 1 << 20
"""The most tokens of a warm-up."""

CORRECTION_KINDS: tuple[CorrectionKind, ...] = get_args(CorrectionKind)

Sharing = Literal["private", "shared", "auto"]
"""Which sessions share an expert set. private: none do. shared: all that may do. auto: the engine
takes whichever costs least at the time, and runs on all neurons while experts gain too little."""

SHARINGS: tuple[Sharing, ...] = get_args(Sharing)

SpeculationMode = Literal["off", "lookup", "slim", "auto"]
"""What drafts tokens. lookup: what followed the last tokens where they stood before, in prompt or
completion. slim: the model on the request's experts. auto: lookup, and slim where tokens are
verified dense, each while it pays by what steps cost."""

DraftSource = Literal["lookup", "slim"]

Verify = Literal["dense", "experts"]
"""What verifies drafted tokens and makes all others: all neurons, so that the tokens are those of
the dense model; or the experts that the request's density leaves."""

ScoreMode = Literal["generation", "classification"]
"""Which tokens choose the experts of a scored continuation, and which tokens run on them.
generation: the context chooses, and every token of the continuation runs on the experts.
classification: the last token that is run runs on the experts, which all tokens before it
choose."""

SCORE_MODES: tuple[ScoreMode, ...] = get_args(ScoreMode)
