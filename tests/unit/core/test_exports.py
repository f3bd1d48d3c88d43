"""What the core offers by name as a library."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import griffin_core
from griffin_core.experts.selection import Selection
from griffin_core.hf import sparsify
from griffin_core.llm import LLM
from griffin_core.model.load import load_model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.speculation import SpeculationParams
from griffin_core.sampling.stopping import StoppingParams


def test_the_public_names_are_exactly_these() -> None:
    expected = {
        "LLM": LLM,
        "SamplingParams": SamplingParams,
        "Selection": Selection,
        "SpeculationParams": SpeculationParams,
        "StoppingParams": StoppingParams,
        "load_model": load_model,
        "sparsify": sparsify,
    }
    assert set(griffin_core.__all__) == set(expected)
    for name, value in expected.items():
        assert getattr(griffin_core, name) is value
        assert name in dir(griffin_core)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'generate'"):
        _ = griffin_core.generate


def test_importing_the_package_and_its_choices_loads_no_torch() -> None:
    program = (
        "import sys, griffin_core; from griffin_core.spec import choices; "
        "sys.exit(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_cpu_needs_no_compiler_for_gpus(tiny_directory: Callable[[str], Path]) -> None:
    """Where triton is installed it is not imported, and where it is not nothing misses it."""
    program = f"""
import sys
sys.modules["triton"] = None
from griffin_core import LLM
with LLM({str(tiny_directory("llama"))!r}, device="cpu", dtype="bfloat16", density=0.5) as llm:
    llm.generate([[1, 2, 3]])
sys.exit([name for name in sys.modules if name.startswith("griffin_core.backends.cuda")] or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
