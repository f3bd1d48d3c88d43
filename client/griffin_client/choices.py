"""The names that requests choose from and that answers use."""

from __future__ import annotations

from typing import Literal

Policy = Literal[
    "topk", "sampled", "topk_sampled", "magnitude", "random", "sensitive", "topk_budgets"
]
Correction = Literal["none", "bias", "residual"]
Speculation = Literal["off", "lookup", "slim", "auto"]
Verify = Literal["dense", "experts"]
Sharing = Literal["private", "shared", "auto"]
ScoreMode = Literal["generation", "classification"]
FinishReason = Literal["eos", "stop_sequence", "max_tokens", "context_length"]
SessionState = Literal["queued", "prefill", "decode", "idle"]
