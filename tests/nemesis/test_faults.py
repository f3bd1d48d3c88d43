"""Each fault of the table: once in ``make test-e2e``, a hundred times in ``make test-slow``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.nemesis.clocks import AS_SHIPPED, Clocks, hurried
from tests.nemesis.faults import FAULTS, Fault
from tests.nemesis.judge import Tally, run
from tests.nemesis.world import World

RESULTS = "NEMESIS_RESULTS"
"""The environment variable with the directory for the numbers of each row; see ``table``."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some runs of each fault."""

    name: str
    runs: int
    clocks: Clocks
    first_seed: int = 0


ONCE = Sample(name="once", runs=1, clocks=hurried(1.2))
AS_USERS_HAVE_IT = Sample(name="as-shipped", runs=3, clocks=AS_SHIPPED)
HUNDRED = [
    Sample(name=f"hurried-{first}", runs=25, clocks=hurried(1), first_seed=first)
    for first in range(0, 100, 25)
]
"""In parts, so that a machine with many cores has them all at once."""


class Worlds:
    """A world for many faults; a new one once a fault has not ended as promised."""

    def __init__(self, make: Callable[[Clocks], World]) -> None:
        self._make = make
        self._worlds: dict[float | None, World] = {}

    def get(self, clocks: Clocks) -> World:
        if clocks.pace not in self._worlds:
            self._worlds[clocks.pace] = self._make(clocks)
        return self._worlds[clocks.pace]

    def end(self) -> None:
        while self._worlds:
            self._worlds.popitem()[1].close()


@pytest.fixture(scope="module")
def worlds(
    tmp_path_factory: pytest.TempPathFactory, tiny_directory: Callable[[str], Path]
) -> Iterator[Worlds]:
    model = str(tiny_directory("llama-long"))
    made = Worlds(lambda clocks: World(tmp_path_factory.mktemp("nemesis"), model, clocks))
    yield made
    made.end()


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(ONCE, marks=[pytest.mark.e2e, pytest.mark.alone]),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (AS_USERS_HAVE_IT, *HUNDRED)),
    ],
    ids=lambda sample: sample.name,
)
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
@pytest.mark.timeout(1200)
def test_a_fault_ends_as_promised(fault: Fault, sample: Sample, worlds: Worlds) -> None:
    tally = Tally()
    for seed in range(sample.first_seed, sample.first_seed + sample.runs):
        try:
            run(worlds.get(sample.clocks), fault, seed, tally)
        except BaseException as error:
            worlds.end()
            note(fault, sample, "failed", {"seed": seed, "why": str(error)[:2000]})
            raise AssertionError(f"{fault.name}, seed {seed}: {error}") from error
    row = {"runs": tally.runs, "retried": tally.retried, "calls": dict(tally.calls)}
    note(fault, sample, "json", row)


def note(fault: Fault, sample: Sample, kind: str, row: dict[str, object]) -> None:
    """Writes what came of a fault, if that is wanted."""
    if folder := os.environ.get(RESULTS):
        path = Path(folder) / f"{FAULTS.index(fault):02}-{sample.name}.{kind}"
        path.write_text(json.dumps(row), "utf-8")
