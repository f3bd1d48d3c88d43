"""What settings and requests choose from by name. Without torch, so that settings are read fast."""

from __future__ import annotations

from typing import Literal

DEFAULT_MODEL = "smollm2-135m-instruct"

PolicyName = Literal["topk", "sampled", "topk_sampled", "magnitude", "random"]

Sharing = Literal["private", "shared", "auto"]
"""Whether a session runs on one expert set with others: never; with all that may; or whatever costs
least at the time, and on all neurons while no set of experts gains enough."""
