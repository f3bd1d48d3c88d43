"""What settings and requests choose from by name. Without torch, so that settings are read fast."""

from __future__ import annotations

from typing import Literal, get_args

DEFAULT_MODEL = "smollm2-135m-instruct"

PolicyName = Literal["topk", "sampled", "topk_sampled", "magnitude", "random"]

Sharing = Literal["private", "shared", "auto"]
"""Whether a session runs on one expert set with others: never; with all that may; or whatever costs
least at the time, and on all neurons while no set of experts gains enough."""

SHARINGS: tuple[Sharing, ...] = get_args(Sharing)

ScoreMode = Literal["generation", "classification"]
"""Which tokens choose the experts of a scored continuation, and which run on them. Generation: the
context chooses, and every token of the continuation runs on them. Classification: every token that
is run chooses, and the last of them alone runs on them."""

SCORE_MODES: tuple[ScoreMode, ...] = get_args(ScoreMode)
