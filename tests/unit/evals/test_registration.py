"""``lm_eval --model griffin`` finds the model by the .pth file that the wheel installs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lm_eval.api.registry import get_model

from griffin_evals.lm import GriffinLM
from griffin_evals.registration import TARGET

PTH = Path(__file__).parents[3] / "evals" / "griffin_lm_eval.pth"


def python(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", program]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def with_pth(directory: Path, program: str) -> str:
    """What a program prints in an interpreter that has read the .pth file at its start."""
    (directory / PTH.name).write_bytes(PTH.read_bytes())
    begun = f"import site; site.addsitedir({str(directory)!r})\n{program}"
    ended = python(begun)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.strip()


def test_the_model_is_there_after_the_import_that_lm_eval_does_itself(tmp_path: Path) -> None:
    program = (
        "from lm_eval.api.registry import model_registry\n"
        "import lm_eval.models\n"
        "print(model_registry._objs['griffin'], 'hf' in model_registry)"
    )
    assert with_pth(tmp_path, program).split() == [TARGET, "True"]


def test_it_costs_one_module_and_brings_nothing_else(tmp_path: Path) -> None:
    program = (
        "import sys; before = set(sys.modules) - {'griffin_evals.registration', 'griffin_evals'}\n"
        f"site.addsitedir({str(tmp_path)!r}); print(sorted(set(sys.modules) - before))"
    )
    assert with_pth(tmp_path, program) == "['griffin_evals', 'griffin_evals.registration']"


def test_an_interpreter_starts_silently_where_the_rest_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / PTH.name).write_bytes(PTH.read_bytes())
    program = f"import site; site.addsitedir({str(tmp_path)!r}); print('on')"
    ended = python(program, "-I")  # without PYTHONPATH
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "on\n", "")


def test_a_program_without_the_pth_finds_it_by_importing_the_model() -> None:
    assert get_model("griffin") is GriffinLM
