"""Each fault of the table, some times in ``make test-e2e`` and a hundred in ``make test-slow``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nemesis.faults import FAULTS, Fault
from tests.nemesis.judge import Tally, run
from tests.nemesis.world import World

RUNS, ALL_RUNS = 1, 100
"""How often each fault happens in ``make test-e2e`` and in ``make test-slow``."""

ONLY_SLOW = ("decode server's engine stuck", "a client does not read")

RESULTS = "NEMESIS_RESULTS"
"""The environment variable with the directory for the numbers of each row; see ``table``."""


class Worlds:
    """One world for many faults; a new one once a fault has not ended as promised."""

    def __init__(self, make: Callable[[], World]) -> None:
        self._make = make
        self._world: World | None = None

    def get(self) -> World:
        self._world = self._world or self._make()
        return self._world

    def end(self) -> None:
        if self._world is not None:
            self._world.close()
            self._world = None


@pytest.fixture(scope="module")
def worlds(
    tmp_path_factory: pytest.TempPathFactory, tiny_directory: Callable[[str], Path]
) -> Iterator[Worlds]:
    model = str(tiny_directory("llama-long"))
    made = Worlds(lambda: World(tmp_path_factory.mktemp("nemesis"), model))
    yield made
    made.end()


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(RUNS, marks=[pytest.mark.e2e, pytest.mark.alone]),
        pytest.param(ALL_RUNS, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
@pytest.mark.timeout(1200)
def test_a_fault_ends_as_promised(fault: Fault, runs: int, worlds: Worlds) -> None:
    if runs == RUNS and fault.name in ONLY_SLOW:
        pytest.skip("its clocks are too fast for a machine with other work")
    tally = Tally()
    for seed in range(runs):
        try:
            run(worlds.get(), fault, seed, tally)
        except BaseException as error:
            worlds.end()
            note(fault, "failed", {"seed": seed, "why": str(error)[:2000]})
            raise AssertionError(f"{fault.name}, seed {seed}: {error}") from error
    row = {"runs": tally.runs, "retried": tally.retried, "calls": dict(tally.calls)}
    note(fault, "json", row)


def note(fault: Fault, kind: str, row: dict[str, object]) -> None:
    """Writes what came of a fault, if that is wanted."""
    if folder := os.environ.get(RESULTS):
        path = Path(folder) / f"{FAULTS.index(fault):02}.{kind}"
        path.write_text(json.dumps(row), "utf-8")
