"""How OpenMP's threads wait: set before torch is loaded, unless the operator has."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from griffin_core.engine.openmp import SPIN_COUNT, wait_briefly

SERVE = ("-m", "griffin_server", "serve", "--model", "/no/such/model")
INSPECT = ("-m", "griffin_server", "inspect", "a", "--out", "none", "--model", "/no/such/model")
IN_PROCESS = ("-c", "import griffin_core.engine.engine")
LIBRARY = ("-c", "import griffin_core, torch")
BENCHMARK = ("-c", "import benchmarks.load, torch")


def spin_count(*arguments: str, **environment: str) -> str:
    """What libgomp says about itself when the process loads it."""
    usual = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**usual, "OMP_DISPLAY_ENV": "verbose", **environment},
        check=False,
    )
    found = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if not found:
        pytest.skip(f"torch's OpenMP is not libgomp: {done.stderr[-300:]}")
    assert len(set(found)) == 1
    return str(found[0])


@pytest.mark.parametrize("entry", [SERVE, INSPECT, IN_PROCESS, BENCHMARK], ids=str)
def test_every_entry_point_sets_it_before_torch_is_loaded(entry: tuple[str, ...]) -> None:
    assert spin_count(*entry) == str(SPIN_COUNT)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
        ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5"}, "5"),
    ],
)
def test_what_the_operator_sets_wins(environment: dict[str, str], count: str) -> None:
    assert spin_count(*LIBRARY, **environment) == count


def test_what_comes_too_late_is_not_set() -> None:
    """A variable that nothing reads would only be inherited by others."""
    assert "torch" in sys.modules
    environment: dict[str, str] = {}
    assert not wait_briefly(environment)
    assert environment == {}


@pytest.mark.parametrize("operators", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "0"}])
def test_only_an_environment_that_says_nothing_is_changed(
    operators: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    environment = dict(operators)
    assert wait_briefly(environment) == (not operators)
    assert environment == (operators or {"GOMP_SPINCOUNT": str(SPIN_COUNT)})


def test_the_client_alone_sets_nothing() -> None:
    code = "import os, griffin_client; print(os.environ.get('GOMP_SPINCOUNT'))"
    usual = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=usual, check=True
    )
    assert done.stdout.strip() == "None"
