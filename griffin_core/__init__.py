"""The method and the engine: torch and transformers; no gRPC, no metrics, no command line.

Imported before torch, it sets how OpenMP's threads wait (``openmp``). What it exports is imported
when it is first used, so that modules without torch stay fast to import.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from griffin_core.openmp import wait_briefly

EXPORTS = {
    "LLM": "griffin_core.llm",
    "SamplingParams": "griffin_core.sampling.params",
    "StoppingParams": "griffin_core.sampling.stopping",
}
"""Exported name -> the module that defines it."""

wait_briefly(os.environ)


if TYPE_CHECKING:
    from griffin_core.llm import LLM as LLM
    from griffin_core.sampling.params import SamplingParams as SamplingParams
    from griffin_core.sampling.stopping import StoppingParams as StoppingParams
else:  # not for type checkers, which would take any name for exported

    def __getattr__(name: str) -> Any:
        if name not in EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *EXPORTS})
