"""The core of Griffin: the method and the engine, on torch and transformers, without gRPC, metrics
or a command line.

If it is imported before torch, it configures how OpenMP threads wait (``openmp``). The public names
are loaded at first use, so that importing the package is fast.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from griffin_core.engine.openmp import wait_briefly

if TYPE_CHECKING:
    from griffin_core.experts.selection import Selection as Selection
    from griffin_core.hf import sparsify as sparsify
    from griffin_core.llm import LLM as LLM
    from griffin_core.model.load import load_model as load_model
    from griffin_core.sampling.params import SamplingParams as SamplingParams
    from griffin_core.sampling.speculation import SpeculationParams as SpeculationParams
    from griffin_core.sampling.stopping import StoppingParams as StoppingParams

wait_briefly(os.environ)

_PUBLIC = {
    "LLM": "griffin_core.llm",
    "SamplingParams": "griffin_core.sampling.params",
    "Selection": "griffin_core.experts.selection",
    "SpeculationParams": "griffin_core.sampling.speculation",
    "StoppingParams": "griffin_core.sampling.stopping",
    "load_model": "griffin_core.model.load",
    "sparsify": "griffin_core.hf",
}
"""Public name -> the module that defines it."""

__all__ = list(_PUBLIC)  # the names are listed once, above


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
